UPDATE cloob_state SET rows = rows + 1000000;
