-- An index. A path names bytes (cloob_items), bytes have a vector of every model (cloob_vectors).

-- Every committed change, with a random stamp: a backup that was put back has other ones.
CREATE TABLE cloob_revisions (revision INTEGER PRIMARY KEY, stamp INTEGER NOT NULL) STRICT;
INSERT INTO cloob_revisions VALUES (0, 0);

CREATE TABLE cloob_models (
  id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, spec TEXT NOT NULL, fingerprint TEXT NOT NULL,
  dim INTEGER NOT NULL, place INTEGER NOT NULL,
  replaces INTEGER,  -- of an unfinished one: the other, which answers until this one is complete
  UNIQUE (name, fingerprint)) STRICT;

-- `base` is a folder; empty, the one around the index; NULL of an address. `path` is the source within it.
CREATE TABLE cloob_sources (
  id INTEGER PRIMARY KEY, base TEXT, path TEXT NOT NULL, exclude TEXT NOT NULL DEFAULT '') STRICT;

CREATE TABLE cloob_contents (
  id INTEGER PRIMARY KEY AUTOINCREMENT, hash TEXT NOT NULL,  -- SHA-256, hex
  unnamed_since INTEGER  -- seconds since 1970; NULL while a path names it
) STRICT;
-- The beginning of a hash: a third of the pages are written for every batch, which falls on random ones.
CREATE INDEX cloob_contents_hash ON cloob_contents (substr(hash, 1, 12));

-- `path` is within the base of the source, or absolute.
CREATE TABLE cloob_items (
  id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER NOT NULL REFERENCES cloob_sources, path TEXT NOT NULL,
  content INTEGER NOT NULL REFERENCES cloob_contents, bytes INTEGER NOT NULL, mtime_ns INTEGER,
  width INTEGER NOT NULL, height INTEGER NOT NULL, date TEXT, date_from TEXT NOT NULL, caption TEXT,
  columns TEXT NOT NULL,  -- JSON
  UNIQUE (source, path)) STRICT;
CREATE INDEX cloob_items_content ON cloob_items (content);

-- The names of the keys of cloob_items.columns, and what they hold.
CREATE TABLE cloob_columns (name TEXT NOT NULL, kind TEXT NOT NULL, PRIMARY KEY (name, kind)) STRICT;

CREATE TABLE cloob_vectors (
  content INTEGER NOT NULL REFERENCES cloob_contents ON DELETE CASCADE, model INTEGER NOT NULL,
  revision INTEGER NOT NULL, vector BLOB NOT NULL, PRIMARY KEY (content, model)) STRICT;
CREATE INDEX cloob_vectors_revision ON cloob_vectors (model, revision, content);

CREATE TABLE cloob_faults (
  source INTEGER NOT NULL REFERENCES cloob_sources, path TEXT NOT NULL, bytes INTEGER NOT NULL, mtime_ns INTEGER,
  fault TEXT NOT NULL, PRIMARY KEY (source, path)) STRICT;
