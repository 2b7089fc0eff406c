-- Intents, finished phases and kept requests. The store applies this file by itself; to apply it by hand:
--   sqlite3 -bail app.db BEGIN '.read migrations/sqlite/0002_intents.sql' COMMIT
-- For a prefix of your own replace the prefix of every name.
-- Times are milliseconds since 1970-01-01 UTC, ids are the 16 bytes of a UUID.

-- Claims, takeovers and the purge look at these columns only, never at the intents themselves.
ALTER TABLE idempotency_records ADD COLUMN unresolved INTEGER NOT NULL DEFAULT 0; -- how many of its intents are open
ALTER TABLE idempotency_records ADD COLUMN repeatable_until INTEGER NULL;         -- until when they may all be called again; NULL: always
ALTER TABLE idempotency_records ADD COLUMN kept INTEGER NOT NULL DEFAULT FALSE;   -- retained: it has an intent or a finished phase

CREATE TABLE idempotency_intents (
    id               BLOB                NOT NULL PRIMARY KEY, -- the upstream key, derived from record, name and discriminator
    record_id        BLOB                NOT NULL,             -- the record that the call is made for
    consumer         TEXT COLLATE BINARY NOT NULL,             -- consumer of that record
    key              TEXT COLLATE BINARY NOT NULL,             -- key of that record
    name             TEXT COLLATE BINARY NOT NULL,             -- what is called
    discriminator    TEXT COLLATE BINARY NOT NULL,             -- tells intents of one name apart; '' where their order does
    ordinal          INTEGER             NOT NULL,             -- place among the intents of one name; 0 with a discriminator
    arguments        BLOB                NOT NULL,             -- digest of what the call is made with
    subject          TEXT                NULL,                 -- the application's own row that it belongs to
    state            TEXT COLLATE BINARY NOT NULL              -- where the intent stands
        CHECK (state IN ('open', 'finalized', 'dead')),
    sent             INTEGER             NOT NULL,             -- false: the last call has certainly not arrived
    sent_before      INTEGER             NOT NULL,             -- an earlier call may have arrived
    absent           INTEGER             NOT NULL,             -- dead because the upstream does not know it: may be called again
    attempt          BLOB                NOT NULL,             -- the attempt that called last
    call             BLOB                NOT NULL,             -- name of the last call: the fence of its outcome
    calls            INTEGER             NOT NULL,             -- how often it was called
    repeatable_until INTEGER             NOT NULL,             -- until when the upstream recognizes the call by its key
    created_at       INTEGER             NOT NULL,             -- when it was opened first
    opened_at        INTEGER             NOT NULL,             -- when it was opened last
    dangling_at      INTEGER             NOT NULL,             -- when it counts as dangling unless it is settled
    settled_at       INTEGER             NULL,                 -- when its outcome was recorded
    resource_id      TEXT                NULL,                 -- what the upstream calls the resource; finalized only
    payload          BLOB                NULL,                 -- what else was recorded of it
    reason           TEXT                NULL,                 -- why it is dead
    look_at          INTEGER             NULL,                 -- when to look it up; far away: needs attention; NULL: settled
    looks            INTEGER             NOT NULL,             -- how often it was looked up since it was opened last or an operator wanted that
    takes            INTEGER             NOT NULL DEFAULT 0,   -- how often it was taken for that since it was opened last: the fence of look-ups
    absences         INTEGER             NOT NULL,             -- how often in a row the upstream did not know it
    attention        TEXT                NULL                  -- what an operator must know
) STRICT;

-- The intents of a record.
CREATE INDEX idempotency_intents_record_id ON idempotency_intents (record_id);

-- Those that somebody has to look at: a handful of rows in a table of any size.
CREATE INDEX idempotency_intents_look_at ON idempotency_intents (look_at) WHERE look_at IS NOT NULL;

-- Those that are dead, for operators.
CREATE INDEX idempotency_intents_dead ON idempotency_intents (created_at) WHERE state = 'dead';

-- Those that are old enough to be purged.
CREATE INDEX idempotency_intents_created_at ON idempotency_intents (created_at);

CREATE TABLE idempotency_phases (
    record_id   BLOB                NOT NULL,                  -- the record whose request it is a step of
    consumer    TEXT COLLATE BINARY NOT NULL,                  -- consumer of that record
    key         TEXT COLLATE BINARY NOT NULL,                  -- key of that record
    name        TEXT COLLATE BINARY NOT NULL,                  -- the step
    attempt     BLOB                NOT NULL,                  -- the attempt that finished it
    result      BLOB                NOT NULL,                  -- what it came to
    finished_at INTEGER             NOT NULL,
    PRIMARY KEY (record_id, name)
) STRICT;

CREATE INDEX idempotency_phases_finished_at ON idempotency_phases (finished_at);

CREATE TABLE idempotency_requests (
    record_id  BLOB                NOT NULL PRIMARY KEY,       -- the record of the request
    consumer   TEXT COLLATE BINARY NOT NULL,                   -- consumer of that record
    key        TEXT COLLATE BINARY NOT NULL,                   -- key of that record
    request    BLOB                NOT NULL,                   -- method, original URI, chosen headers and body; no credentials
    tries      INTEGER             NOT NULL,                   -- how often it was sent again
    next_at    INTEGER             NULL,                       -- when to send it again; NULL: never, needs attention
    attention  TEXT                NULL                        -- what an operator must know
) STRICT;

CREATE INDEX idempotency_requests_next_at ON idempotency_requests (next_at);

INSERT INTO idempotency_migrations (version) VALUES (2);
