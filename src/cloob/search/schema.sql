-- An index. A path names bytes (cloob_items), bytes have a vector of every model (cloob_vectors).

-- Every committed change, with a random stamp: a backup that was put back has other ones.
CREATE TABLE cloob_revisions (revision INTEGER PRIMARY KEY, stamp INTEGER NOT NULL) STRICT;
INSERT INTO cloob_revisions VALUES (0, 0);

CREATE TABLE cloob_models (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, spec TEXT NOT NULL, fingerprint TEXT NOT NULL,
  dim INTEGER NOT NULL, place INTEGER NOT NULL,
  inv_tau REAL, replaces INTEGER,  -- of an unfinished one: the other, which answers until this one is complete
  UNIQUE (name, fingerprint)) STRICT;

-- `path` is absolute; empty, it is the folder around the index, which may move.
CREATE TABLE cloob_sources (
  id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, exclude TEXT NOT NULL DEFAULT '') STRICT;

CREATE TABLE cloob_contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL UNIQUE,  -- SHA-256, hex
  unnamed_since INTEGER  -- seconds since 1970; NULL while a path names it
) STRICT;

-- `path` is absolute, or within the folder around the index.
CREATE TABLE cloob_items (
  id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER NOT NULL, path TEXT NOT NULL,
  content INTEGER NOT NULL, bytes INTEGER NOT NULL, mtime_ns INTEGER,
  width INTEGER NOT NULL, height INTEGER NOT NULL, date TEXT, date_from TEXT NOT NULL, caption TEXT,
  columns TEXT NOT NULL,  -- JSON
  UNIQUE (source, path)) STRICT;
CREATE INDEX cloob_items_content ON cloob_items (content);

-- The names of the keys of cloob_items.columns, and what they hold.
CREATE TABLE cloob_columns (name TEXT NOT NULL, kind TEXT NOT NULL, PRIMARY KEY (name, kind)) STRICT;

-- A vector of a content is written once and never changed; `id` grows.
CREATE TABLE cloob_vectors (
  id INTEGER PRIMARY KEY AUTOINCREMENT, content INTEGER NOT NULL,
  model INTEGER NOT NULL, vector BLOB NOT NULL, UNIQUE (content, model)) STRICT;

CREATE TABLE cloob_faults (
  source INTEGER NOT NULL, path TEXT NOT NULL, bytes INTEGER NOT NULL, mtime_ns INTEGER,
  fault TEXT NOT NULL, PRIMARY KEY (source, path)) STRICT;
