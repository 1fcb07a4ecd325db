-- An index. A path names bytes (cloob_items); bytes have a row in the file of every model's vectors (cloob_vectors).

CREATE TABLE cloob_state (revision INTEGER NOT NULL) STRICT;  -- grows with every committed change
INSERT INTO cloob_state VALUES (0);

-- `rows` are in the file `vectors-ID-PACKED.f32`; what stands after them was never committed.
CREATE TABLE cloob_models (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, fingerprint TEXT NOT NULL,
  dim INTEGER NOT NULL, inv_tau REAL, rows INTEGER NOT NULL DEFAULT 0, packed INTEGER NOT NULL DEFAULT 0) STRICT;

-- `path` is absolute; empty, it is the folder around the index, which may move.
CREATE TABLE cloob_sources (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE) STRICT;

CREATE TABLE cloob_contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL UNIQUE,  -- SHA-256, hex
  unnamed_since INTEGER  -- seconds since 1970; NULL while a path names it
) STRICT;

-- A file: a picture, or with a fault one that could not be read. `path` is absolute, or within the folder around the index.
CREATE TABLE cloob_items (
  id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER NOT NULL, path TEXT NOT NULL,
  content INTEGER, bytes INTEGER NOT NULL, mtime_ns INTEGER,
  width INTEGER NOT NULL, height INTEGER NOT NULL, date TEXT, date_from TEXT NOT NULL, caption TEXT,
  columns TEXT NOT NULL,  -- JSON
  fault TEXT, UNIQUE (source, path)) STRICT;
CREATE INDEX cloob_items_content ON cloob_items (content);
CREATE VIEW cloob_pictures AS SELECT * FROM cloob_items WHERE content IS NOT NULL;

-- The names of the keys of cloob_items.columns, and what they hold.
CREATE TABLE cloob_columns (name TEXT NOT NULL, kind TEXT NOT NULL, PRIMARY KEY (name, kind)) STRICT;

CREATE TABLE cloob_vectors (
  model INTEGER NOT NULL, content INTEGER NOT NULL, row INTEGER NOT NULL,
  PRIMARY KEY (model, content)) STRICT, WITHOUT ROWID;
