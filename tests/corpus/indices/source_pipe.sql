UPDATE cloob_items SET source = 'pipe:touch /tmp/cloob-was-here-index; cat a.tar', path = 'a.tar::a.png' WHERE id = 1;
