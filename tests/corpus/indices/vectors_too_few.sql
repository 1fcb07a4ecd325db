UPDATE cloob_models SET rows = rows + 1000000;
