UPDATE cloob_items SET date = CAST(x'32303234ff' AS TEXT);
