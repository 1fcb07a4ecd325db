UPDATE cloob_items SET source = 'http://127.0.0.1:9/a.tar', path = 'a.tar::a.png' WHERE id = 1;
