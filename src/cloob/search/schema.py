"""The tables of an index; each database fills in its types."""

TABLES = """
CREATE TABLE cloob_revisions (revision {int} PRIMARY KEY, stamp {int} NOT NULL) {strict};
CREATE TABLE cloob_models (id {id}, name TEXT NOT NULL UNIQUE, spec TEXT NOT NULL, fingerprint TEXT NOT NULL,
  dim {int} NOT NULL) {strict};
CREATE TABLE cloob_items (id {id}, source TEXT NOT NULL, path TEXT NOT NULL, content TEXT NOT NULL,
  bytes {int} NOT NULL, mtime_ns {int}, width {int} NOT NULL, height {int} NOT NULL, date TEXT, caption TEXT,
  columns {json} NOT NULL, UNIQUE (source, path)) {strict};
CREATE INDEX cloob_items_content ON cloob_items (content);
CREATE TABLE cloob_vectors (item {int} NOT NULL REFERENCES cloob_items ON DELETE CASCADE, model {int} NOT NULL,
  revision {int} NOT NULL, vector {vector} NOT NULL, PRIMARY KEY (item, model)) {strict};
CREATE INDEX cloob_vectors_revision ON cloob_vectors (model, revision, item);
CREATE TABLE cloob_faults (source TEXT NOT NULL, path TEXT NOT NULL, bytes {int} NOT NULL, mtime_ns {int},
  fault TEXT NOT NULL, PRIMARY KEY (source, path)) {strict};
CREATE TABLE cloob_excludes (source TEXT NOT NULL, glob TEXT NOT NULL) {strict}"""
