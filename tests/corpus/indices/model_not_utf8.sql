UPDATE cloob_model SET name = CAST(x'ff41' AS TEXT);
