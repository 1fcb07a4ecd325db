UPDATE cloob_models SET name = CAST(x'ff41' AS TEXT);
