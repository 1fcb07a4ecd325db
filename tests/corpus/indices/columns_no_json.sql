UPDATE items SET columns = '{';
