UPDATE cloob_vectors SET vector = CAST(zeroblob(length(vector) - 4) || x'0000c07f' AS BLOB);
