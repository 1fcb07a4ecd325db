DROP TABLE cloob_contents;
