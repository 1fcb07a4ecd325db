UPDATE cloob_items SET columns = '{';
