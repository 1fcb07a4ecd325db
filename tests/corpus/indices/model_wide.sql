UPDATE cloob_model SET dim = 1099511627776;
