UPDATE cloob_state SET file = -1;
