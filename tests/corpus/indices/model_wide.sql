UPDATE cloob_models SET dim = 1099511627776;
