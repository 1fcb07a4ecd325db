CREATE TABLE cloob_revisions (revision {int} PRIMARY KEY, stamp {int} NOT NULL, last_id {int} NOT NULL) {strict};
INSERT INTO cloob_revisions VALUES (0, 0, 0);
CREATE TABLE cloob_models (id {id}, name TEXT NOT NULL, spec TEXT NOT NULL, fingerprint TEXT NOT NULL,
  dim {int} NOT NULL, place {int} NOT NULL, replaces {int}, UNIQUE (name, fingerprint)) {strict};
CREATE TABLE cloob_items (id {int} PRIMARY KEY, source TEXT NOT NULL, path TEXT NOT NULL, content TEXT NOT NULL,
  bytes {int} NOT NULL, mtime_ns {int}, width {int} NOT NULL, height {int} NOT NULL, date TEXT, caption TEXT,
  columns {json} NOT NULL, UNIQUE (source, path)) {strict};
-- The beginning of a hash: a third of the pages are written for every batch, which falls on random ones.
CREATE INDEX cloob_items_content ON cloob_items (substr(content, 1, 12));
CREATE TABLE cloob_vectors (item {int} NOT NULL REFERENCES cloob_items ON DELETE CASCADE, model {int} NOT NULL,
  revision {int} NOT NULL, vector {vector} NOT NULL, PRIMARY KEY (item, model)) {strict};
CREATE INDEX cloob_vectors_revision ON cloob_vectors (model, revision, item);
CREATE TABLE cloob_faults (source TEXT NOT NULL, path TEXT NOT NULL, bytes {int} NOT NULL, mtime_ns {int},
  fault TEXT NOT NULL, PRIMARY KEY (source, path)) {strict};
CREATE TABLE cloob_sources (source TEXT PRIMARY KEY, exclude TEXT NOT NULL) {strict};
