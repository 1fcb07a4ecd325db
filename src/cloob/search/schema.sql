-- An index by one model. A path names bytes (cloob_items); bytes have a row in the file of vectors (cloob_contents).

CREATE TABLE cloob_state (
  revision INTEGER NOT NULL,  -- grows with every committed change
  file INTEGER NOT NULL,  -- of the vectors, `vectors-FILE.f32` in hex: drawn by chance, so that no other database names it
  rows INTEGER NOT NULL  -- of that file; what stands after them was never committed
) STRICT;
INSERT INTO cloob_state VALUES (0, 0, 0);

-- One row; none as long as nothing was embedded.
CREATE TABLE cloob_model (
  name TEXT NOT NULL, spec TEXT NOT NULL, fingerprint TEXT NOT NULL, dim INTEGER NOT NULL, inv_tau REAL) STRICT;

-- `path` is absolute; empty, it is the folder around the index, which may move.
CREATE TABLE cloob_sources (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE) STRICT;

CREATE TABLE cloob_contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL UNIQUE,  -- SHA-256, hex
  row INTEGER NOT NULL,  -- of its vector
  unnamed_since INTEGER  -- seconds since 1970; NULL while a path names it
) STRICT;

-- A file: a picture, or with a fault one that could not be read. `path` is absolute, or within the folder around the index.
CREATE TABLE cloob_items (
  id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER NOT NULL, path TEXT NOT NULL,
  content INTEGER, bytes INTEGER NOT NULL, mtime_ns INTEGER,
  width INTEGER NOT NULL, height INTEGER NOT NULL, date TEXT, caption TEXT,
  columns TEXT NOT NULL,  -- JSON
  fault TEXT, UNIQUE (source, path)) STRICT;
CREATE INDEX cloob_items_content ON cloob_items (content);
CREATE VIEW cloob_pictures AS SELECT * FROM cloob_items WHERE content IS NOT NULL;

-- The names of the keys of cloob_items.columns, and what they hold.
CREATE TABLE cloob_columns (name TEXT NOT NULL, kind TEXT NOT NULL, PRIMARY KEY (name, kind)) STRICT;
