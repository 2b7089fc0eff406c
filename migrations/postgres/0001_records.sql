-- Records of idempotent requests. The store applies this file by itself; to apply it by hand:
--   psql --single-transaction --set ON_ERROR_STOP=1 --file migrations/postgres/0001_records.sql
-- For a prefix of your own replace the prefix of every name; for a schema of your own set search_path first.
-- The store's account needs SELECT, INSERT, UPDATE, DELETE on the records and SELECT on the migrations.

CREATE TABLE IF NOT EXISTS idempotency_migrations (
    version    integer     NOT NULL PRIMARY KEY,       -- number of the file
    applied_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE idempotency_records (
    consumer       text COLLATE "C" NOT NULL,          -- the API consumer that the key belongs to
    key            text COLLATE "C" NOT NULL,          -- the idempotency key, as the client sent it
    id             uuid             NOT NULL,          -- name of the record, the same over all of its attempts
    fingerprint    bytea            NOT NULL,          -- digest of the request
    state          text COLLATE "C" NOT NULL CHECK (state IN ('in_progress', 'held', 'completed')),
    attempt        uuid             NULL,              -- the attempt that owns or completed the record: the fence
    attempt_number integer          NOT NULL,          -- counts the attempts of this record from 1
    abandoned      smallint         NOT NULL,          -- how many attempts let their lease run out
    max_abandoned  smallint         NOT NULL,          -- at how many the record is held, as it was claimed
    lease_until    timestamptz      NOT NULL,          -- until when the attempt owns the record undisputed
    created_at     timestamptz      NOT NULL,          -- when the record was claimed first
    expires_at     timestamptz      NOT NULL,          -- from when on the record counts as absent, unless owned or held
    completed_at   timestamptz      NULL,              -- when the response was stored
    response       bytea            NULL,              -- the encoded response
    PRIMARY KEY (consumer, key)
) WITH (fillfactor = 85);

CREATE INDEX idempotency_records_expires_at ON idempotency_records (expires_at);

INSERT INTO idempotency_migrations (version) VALUES (1);
