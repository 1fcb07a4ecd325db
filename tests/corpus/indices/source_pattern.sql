UPDATE cloob_items SET source = '/tmp/{0..9}/*.tar', path = '/tmp/x.tar::a.png' WHERE id = 1;
