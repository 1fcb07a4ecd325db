ALTER TABLE cloob_items ADD COLUMN c TEXT AS (upper(path));
