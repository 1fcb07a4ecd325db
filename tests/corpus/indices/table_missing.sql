DROP TABLE cloob_vectors;
