-- Records of idempotent requests. The store applies this file by itself; to apply it by hand:
--   sqlite3 -bail app.db BEGIN '.read migrations/sqlite/0001_records.sql' COMMIT
-- For a prefix of your own replace the prefix of every name.
-- Times are milliseconds since 1970-01-01 UTC, ids are the 16 bytes of a UUID.

CREATE TABLE IF NOT EXISTS idempotency_migrations (
    version    INTEGER NOT NULL PRIMARY KEY,           -- number of the file
    -- when it was applied
    applied_at INTEGER NOT NULL DEFAULT (CAST((julianday('now') - 2440587.5) * 86400000.0 AS INTEGER))
) STRICT;

CREATE TABLE idempotency_records (
    consumer       TEXT COLLATE BINARY NOT NULL,       -- the API consumer that the key belongs to
    key            TEXT COLLATE BINARY NOT NULL,       -- the idempotency key, as the client sent it
    id             BLOB                NOT NULL,       -- name of the record, the same over all of its attempts
    fingerprint    BLOB                NOT NULL,       -- digest of the request
    state          TEXT COLLATE BINARY NOT NULL        -- where the record stands
        CHECK (state IN ('in_progress', 'held', 'completed')),
    attempt        BLOB                NULL,           -- the attempt that owns or completed the record: the fence
    attempt_number INTEGER             NOT NULL,       -- counts the attempts of this record from 1
    abandoned      INTEGER             NOT NULL,       -- how many attempts let their lease run out
    max_abandoned  INTEGER             NOT NULL,       -- at how many the record is held, as it was claimed
    lease_until    INTEGER             NOT NULL,       -- until when the attempt owns the record undisputed
    created_at     INTEGER             NOT NULL,       -- when the record was claimed first
    expires_at     INTEGER             NOT NULL,       -- when the record becomes absent, unless owned or held
    completed_at   INTEGER             NULL,           -- when the response was stored
    response       BLOB                NULL,           -- the encoded response
    PRIMARY KEY (consumer, key)
) STRICT;

-- For the purge.
CREATE INDEX idempotency_records_expires_at ON idempotency_records (expires_at);

INSERT INTO idempotency_migrations (version) VALUES (1);
