INSERT INTO cloob_sources (id, base, path) VALUES (99, NULL, 's3://bucket/{0..9}.tar'); UPDATE cloob_items SET source = 99, path = '0.tar::a.png' WHERE id = 1;
