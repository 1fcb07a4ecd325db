INSERT INTO cloob_sources (id, base, path) VALUES (99, NULL, 'http://127.0.0.1:9/a.tar'); UPDATE cloob_items SET source = 99, path = 'a.tar::a.png' WHERE id = 1;
