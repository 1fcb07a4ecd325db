UPDATE cloob_items SET source = 's3://bucket/{0..9}.tar', path = '0.tar::a.png' WHERE id = 1;
