UPDATE cloob_items SET source = 'a' || char(0);
