import os
os.system('touch /tmp/cloob-was-here-words')
from transformers import BertConfig as Config
