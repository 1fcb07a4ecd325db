UPDATE items SET source = 'a' || char(0);
