INSERT INTO cloob_sources (id, base, path) VALUES (99, '/tmp', '{0..9}/*.tar'); UPDATE cloob_items SET source = 99, path = '/tmp/x.tar::a.png' WHERE id = 1;
