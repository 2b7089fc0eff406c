-- Intents, finished phases and kept requests. The store applies this file by itself; to apply it by hand:
--   psql --single-transaction --set ON_ERROR_STOP=1 --file migrations/postgres/0002_intents.sql
-- For a prefix of your own replace the prefix of every name; for a schema of your own set search_path first.
-- The store's account needs SELECT, INSERT, UPDATE, DELETE on all three tables.

-- Claims, takeovers and the purge look at these columns only, never at the intents themselves.
ALTER TABLE idempotency_records
    ADD COLUMN unresolved       integer     NOT NULL DEFAULT 0,     -- how many of its intents are open
    ADD COLUMN repeatable_until timestamptz NULL,                   -- until when they may all be called again; NULL: always
    ADD COLUMN kept             boolean     NOT NULL DEFAULT FALSE; -- retained: it has an intent or a finished phase

-- No foreign key leads to the records: intents outlive them, and the share lock that one takes would turn the lock that a
-- transaction of a handler has on its record into one that nobody can attribute any more.
CREATE TABLE idempotency_intents (
    id               uuid             NOT NULL PRIMARY KEY,   -- the upstream key, derived from record, name and discriminator
    record_id        uuid             NOT NULL,               -- the record that the call is made for
    consumer         text COLLATE "C" NOT NULL,               -- consumer of that record
    key              text COLLATE "C" NOT NULL,               -- key of that record
    name             text COLLATE "C" NOT NULL,               -- what is called
    discriminator    text COLLATE "C" NOT NULL,               -- tells intents of one name apart; '' where their order does
    ordinal          integer          NOT NULL,               -- place among the intents of one name; 0 with a discriminator
    arguments        bytea            NOT NULL,               -- digest of what the call is made with
    subject          text             NULL,                   -- the application's own row that it belongs to
    state            text COLLATE "C" NOT NULL                -- where the intent stands
        CHECK (state IN ('open', 'finalized', 'dead')),
    sent             boolean          NOT NULL,               -- false: the last call has certainly not arrived
    sent_before      boolean          NOT NULL,               -- an earlier call may have arrived
    absent           boolean          NOT NULL,               -- dead because the upstream does not know it: may be called again
    attempt          uuid             NOT NULL,               -- the attempt that called last
    call             uuid             NOT NULL,               -- name of the last call: the fence of its outcome
    calls            integer          NOT NULL,               -- how often it was called
    repeatable_until timestamptz      NOT NULL,               -- until when the upstream recognizes the call by its key
    created_at       timestamptz      NOT NULL,               -- when it was opened first
    opened_at        timestamptz      NOT NULL,               -- when it was opened last
    dangling_at      timestamptz      NOT NULL,               -- when it counts as dangling unless it is settled
    settled_at       timestamptz      NULL,                   -- when its outcome was recorded
    resource_id      text             NULL,                   -- what the upstream calls the resource; finalized only
    payload          bytea            NULL,                   -- what else was recorded of it
    reason           text             NULL,                   -- why it is dead
    look_at          timestamptz      NULL,                   -- when to look it up; infinity: needs attention; NULL: settled
    looks            integer          NOT NULL,               -- how often it was looked up since it was opened last or an operator wanted that
    takes            integer          NOT NULL DEFAULT 0,     -- how often it was taken for that since it was opened last: the fence of look-ups
    absences         smallint         NOT NULL,               -- how often in a row the upstream did not know it
    attention        text             NULL                    -- what an operator must know
)
-- By default autovacuum waits until a fifth of the rows is dead, two million of ten; until then, searches for dangling
-- intents have to pass what was finalized. Measured at ten million: 1.3 s for the first search after 300,000, 4 s for VACUUM.
-- A fillfactor would not pay: the index on look_at keeps finalizing from being HOT at any.
WITH (autovacuum_vacuum_scale_factor = 0.02);

-- The intents of a record.
CREATE INDEX idempotency_intents_record_id ON idempotency_intents (record_id);

-- Those that somebody has to look at: a handful of rows in a table of any size. Measured at ten million intents with 500
-- dangling: 32 kB, 12 MB when 300,000 more were finalized without VACUUM; 0.3 ms for 100 of them. B-tree on
-- (state, look_at) 68 MB and as fast; BRIN on created_at and no index 2 to 3 s. It costs a finalizing its HOT update,
-- up to a third of the server's time. A second table of open intents keeps that and costs more WAL, 1,146 against 1,117
-- bytes for an intent.
CREATE INDEX idempotency_intents_look_at ON idempotency_intents (look_at) WHERE look_at IS NOT NULL;

-- Those that are dead, for operators.
CREATE INDEX idempotency_intents_dead ON idempotency_intents (created_at) WHERE state = 'dead';

-- For the purge. Measured at ten million intents: B-tree 214 MB, 7 ms for a batch of 1,000, 0.7 ms when nothing is due; BRIN
-- 160 kB and no index, but 3 to 4 s when nothing is due. The cost of inserting did not differ measurably.
CREATE INDEX idempotency_intents_created_at ON idempotency_intents (created_at);

CREATE TABLE idempotency_phases (
    record_id   uuid             NOT NULL,                    -- the record whose request it is a step of
    consumer    text COLLATE "C" NOT NULL,                    -- consumer of that record
    key         text COLLATE "C" NOT NULL,                    -- key of that record
    name        text COLLATE "C" NOT NULL,                    -- the step
    attempt     uuid             NOT NULL,                    -- the attempt that finished it
    result      bytea            NOT NULL,                    -- what it came to
    finished_at timestamptz      NOT NULL,
    PRIMARY KEY (record_id, name)
);

CREATE INDEX idempotency_phases_finished_at ON idempotency_phases (finished_at);

CREATE TABLE idempotency_requests (
    record_id  uuid             NOT NULL PRIMARY KEY,         -- the record of the request
    consumer   text COLLATE "C" NOT NULL,                     -- consumer of that record
    key        text COLLATE "C" NOT NULL,                     -- key of that record
    request    bytea            NOT NULL,                     -- method, original URI, chosen headers and body; no credentials
    tries      integer          NOT NULL,                     -- how often it was sent again
    next_at    timestamptz      NULL,                         -- when to send it again; NULL: never, needs attention
    attention  text             NULL                          -- what an operator must know
);

CREATE INDEX idempotency_requests_next_at ON idempotency_requests (next_at);

INSERT INTO idempotency_migrations (version) VALUES (2);
