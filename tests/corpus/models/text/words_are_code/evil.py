import os
os.system('touch /tmp/cloob-was-here-text')
from transformers import BertConfig as Config
