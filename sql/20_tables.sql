-- Tables.  The ledger is of exceptions: a good item writes nothing of its own.

CREATE TABLE redrive.handlers (
    handler_id int GENERATED ALWAYS AS IDENTITY,
    name text NOT NULL,
    kind redrive.handler_kind NOT NULL,
    owner regrole NOT NULL,
    function text,
    signature redrive.handler_signature,
    max_retries int NOT NULL,
    retry_delay interval,
    retry_factor float8 NOT NULL,
    retry_delay_max interval NOT NULL,
    stale_after interval NOT NULL,
    start_timeout interval NOT NULL,
    retry_window interval NOT NULL,
    item_timeout interval,
    isolation redrive.isolation_mode NOT NULL,
    commit_interval interval NOT NULL,
    max_workers int,
    tolerated_failures int,
    on_unlock text,
    on_finish text,
    paused boolean NOT NULL DEFAULT false,
    created_at timestamptz NOT NULL DEFAULT now(),
    notify boolean NOT NULL DEFAULT false,
    CONSTRAINT handlers_pkey PRIMARY KEY (handler_id),
    CONSTRAINT handlers_name_key UNIQUE (name),
    CONSTRAINT handlers_name_check CHECK (name <> '' AND length(name) <= 100),
    CONSTRAINT handlers_function_check CHECK ((kind = 'external') = (function IS NULL)),
    CONSTRAINT handlers_signature_check CHECK (CASE kind WHEN 'row' THEN signature IN ('payload', 'key_payload', 'item') WHEN 'set' THEN signature = 'items' ELSE signature IS NULL END),
    CONSTRAINT handlers_max_retries_check CHECK (max_retries BETWEEN 0 AND 1000),
    CONSTRAINT handlers_retry_delay_check CHECK (retry_delay >= interval '0' AND retry_delay <= interval '100 years'),
    CONSTRAINT handlers_retry_factor_check CHECK (retry_factor BETWEEN 1 AND 100),
    CONSTRAINT handlers_retry_delay_max_check CHECK (retry_delay_max >= interval '0' AND retry_delay_max <= interval '100 years'),
    -- these are added to times: years less days can be short and still lead out of what a timestamp holds
    CONSTRAINT handlers_stale_after_check CHECK (stale_after > interval '0' AND stale_after <= interval '100 years' AND least(extract(year FROM stale_after), extract(day FROM stale_after), extract(hour FROM stale_after)) >= 0),
    CONSTRAINT handlers_start_timeout_check CHECK (start_timeout > interval '0' AND start_timeout <= interval '100 years' AND least(extract(year FROM start_timeout), extract(day FROM start_timeout), extract(hour FROM start_timeout)) >= 0),
    CONSTRAINT handlers_retry_window_check CHECK (retry_window > interval '0' AND retry_window <= interval '100 years' AND least(extract(year FROM retry_window), extract(day FROM retry_window), extract(hour FROM retry_window)) >= 0),
    CONSTRAINT handlers_item_timeout_check CHECK (item_timeout >= interval '1 ms' AND item_timeout <= interval '20 days'),
    CONSTRAINT handlers_commit_interval_check CHECK (commit_interval BETWEEN interval '1 ms' AND interval '1 hour'),
    CONSTRAINT handlers_max_workers_check CHECK (max_workers > 0),
    CONSTRAINT handlers_tolerated_failures_check CHECK (tolerated_failures >= 0),
    CONSTRAINT handlers_notify_check CHECK (NOT notify OR (kind = 'external' AND octet_length(name) <= 55))
);
CREATE INDEX handlers_owner_idx ON redrive.handlers (owner);

CREATE TABLE redrive.rotation (
    part smallint NOT NULL,
    parts smallint NOT NULL,
    retention interval NOT NULL,
    rotated_at timestamptz NOT NULL,
    CONSTRAINT rotation_part_check CHECK (part >= 0 AND part < parts),
    CONSTRAINT rotation_retention_check CHECK (retention > interval '0')
);
CREATE UNIQUE INDEX rotation_one_row_idx ON redrive.rotation ((true));
INSERT INTO redrive.rotation (part, parts, retention, rotated_at) VALUES (0, 8, interval '30 days', now());

CREATE TABLE redrive.batches (
    batch_id bigint GENERATED ALWAYS AS IDENTITY,
    handler_id int NOT NULL,
    part smallint NOT NULL,
    state redrive.batch_state NOT NULL,
    priority int NOT NULL,
    run_no int NOT NULL DEFAULT 1,
    total bigint NOT NULL DEFAULT 0,
    claimed_to bigint NOT NULL DEFAULT 0,
    succeeded bigint NOT NULL DEFAULT 0,
    ignored bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    cancelled bigint NOT NULL DEFAULT 0,
    waiting bigint NOT NULL DEFAULT 0,
    failures_accepted bigint NOT NULL DEFAULT 0,
    keyed boolean NOT NULL DEFAULT false,
    submitted_by regrole NOT NULL,
    run_at timestamptz NOT NULL,
    serve_after timestamptz NOT NULL,
    next_retry_at timestamptz,
    oldest_failure_at timestamptz,
    items_per_second float8,
    created_at timestamptz NOT NULL DEFAULT now(),
    sealed_at timestamptz,
    started_at timestamptz,
    last_progress_at timestamptz NOT NULL DEFAULT now(),
    attempted_at timestamptz,
    finished_at timestamptz,
    label text,
    idempotency_key text,
    pause_reason text,
    claimable boolean NOT NULL GENERATED ALWAYS AS (state IN ('ready', 'running') AND claimed_to < total) STORED,
    CONSTRAINT batches_pkey PRIMARY KEY (batch_id),
    CONSTRAINT batches_handler_id_fkey FOREIGN KEY (handler_id) REFERENCES redrive.handlers,
    CONSTRAINT batches_total_check CHECK (total >= 0 AND claimed_to BETWEEN 0 AND total),
    CONSTRAINT batches_open_check CHECK ((state = 'open') = (sealed_at IS NULL) OR state = 'cancelled'),
    CONSTRAINT batches_started_check CHECK (state IN ('open', 'ready', 'paused', 'cancelled') OR started_at IS NOT NULL),
    CONSTRAINT batches_finished_check CHECK (state IN ('finished', 'cancelled') OR finished_at IS NULL),
    CONSTRAINT batches_attempted_check CHECK (state NOT IN ('retrying', 'finished') OR claimed_to = total),
    CONSTRAINT batches_paused_check CHECK ((state = 'paused') = (pause_reason IS NOT NULL))
) WITH (fillfactor = 70);
CREATE UNIQUE INDEX batches_idempotency_key_idx ON redrive.batches (handler_id, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX batches_claimable_idx ON redrive.batches (handler_id, priority DESC, serve_after) WHERE claimable;
CREATE INDEX batches_due_idx ON redrive.batches (serve_after) WHERE claimable;
CREATE INDEX batches_retry_idx ON redrive.batches (handler_id, next_retry_at) WHERE next_retry_at IS NOT NULL AND state IN ('running', 'retrying');
CREATE INDEX batches_retry_priority_idx ON redrive.batches (handler_id, priority DESC, next_retry_at) WHERE next_retry_at IS NOT NULL AND state IN ('running', 'retrying');
CREATE INDEX batches_live_idx ON redrive.batches (handler_id) WHERE state NOT IN ('finished', 'cancelled');
CREATE INDEX batches_part_idx ON redrive.batches (part, finished_at);

-- Items are stored in blocks of neighbours: one row, one index entry and one
-- WAL record for many small items.  Read them through redrive.items.
CREATE TABLE redrive.item_blocks (
    part smallint NOT NULL,
    batch_id bigint NOT NULL,
    first_no bigint NOT NULL,
    items int NOT NULL,
    bytes int NOT NULL,
    keys text[],
    payloads jsonb[] NOT NULL,
    CONSTRAINT item_blocks_pkey PRIMARY KEY (part, batch_id, first_no)
) PARTITION BY LIST (part);

CREATE TABLE redrive.chunks (
    chunk_id bigint GENERATED ALWAYS AS IDENTITY,
    batch_id bigint NOT NULL,
    handler_id int NOT NULL,
    part smallint NOT NULL,
    run_no int NOT NULL,
    kind redrive.chunk_kind NOT NULL,
    state redrive.chunk_state NOT NULL,
    from_no bigint NOT NULL,
    to_no bigint NOT NULL,
    done_to bigint NOT NULL,
    items bigint NOT NULL,
    done bigint NOT NULL DEFAULT 0,
    succeeded bigint NOT NULL DEFAULT 0,
    ignored bigint NOT NULL DEFAULT 0,
    failed bigint NOT NULL DEFAULT 0,
    cancelled bigint NOT NULL DEFAULT 0,
    waiting bigint NOT NULL DEFAULT 0,
    folded boolean NOT NULL DEFAULT false,
    lease_token bigint,
    worker_pid int,
    worker_started_at timestamptz,
    rescue_count int NOT NULL DEFAULT 0,
    excused int NOT NULL DEFAULT 0,
    claim_done bigint NOT NULL DEFAULT 0,
    claimed_at timestamptz NOT NULL,
    progress_at timestamptz NOT NULL,
    finished_at timestamptz,
    worker text,
    lease interval,
    lease_until timestamptz,
    settled int8multirange,
    CONSTRAINT chunks_pkey PRIMARY KEY (chunk_id),
    CONSTRAINT chunks_range_check CHECK (from_no <= to_no + 1 AND done_to BETWEEN from_no - 1 AND to_no AND done <= items),
    CONSTRAINT chunks_worker_check CHECK ((state = 'running') = (lease_token IS NOT NULL AND (worker_pid IS NOT NULL OR lease_until IS NOT NULL))),
    CONSTRAINT chunks_lease_check CHECK (lease_until IS NULL OR (state = 'running' AND worker_pid IS NULL AND lease IS NOT NULL)),
    CONSTRAINT chunks_settled_check CHECK (NOT isempty(settled)),
    CONSTRAINT chunks_done_check CHECK ((state = 'done') = (finished_at IS NOT NULL)),
    CONSTRAINT chunks_folded_check CHECK (state = 'done' OR NOT folded)
) WITH (fillfactor = 50);
CREATE INDEX chunks_unfolded_idx ON redrive.chunks (batch_id) WHERE NOT folded;
CREATE INDEX chunks_running_idx ON redrive.chunks (handler_id) WHERE state = 'running';
CREATE INDEX chunks_orphaned_idx ON redrive.chunks (handler_id) WHERE state = 'orphaned';
CREATE INDEX chunks_batch_id_idx ON redrive.chunks (batch_id);
-- not WHERE state = 'done': while the table is small it would be taken for what chunks_unfolded_idx is for
CREATE INDEX chunks_finished_idx ON redrive.chunks (finished_at) WHERE finished_at IS NOT NULL;

-- The items of a retry chunk, in their order, as long as it is not done.
CREATE TABLE redrive.retry_lists (
    chunk_id bigint NOT NULL,
    item_nos bigint[] NOT NULL,
    attempts int[] NOT NULL,
    free_counts int[] NOT NULL,
    first_failed_at timestamptz[] NOT NULL,
    CONSTRAINT retry_lists_pkey PRIMARY KEY (chunk_id)
);

CREATE TABLE redrive.failures (
    part smallint NOT NULL,
    batch_id bigint NOT NULL,
    item_no bigint NOT NULL,
    handler_id int NOT NULL,
    run_no int NOT NULL,
    state redrive.failure_state NOT NULL,
    reason redrive.fail_reason,
    rule_id int,
    error_class text NOT NULL,
    sqlstate text NOT NULL,
    fingerprint text NOT NULL,
    retry_count int NOT NULL,
    free_count int NOT NULL,
    attempts int NOT NULL,
    first_failed_at timestamptz NOT NULL,
    last_failed_at timestamptz NOT NULL,
    next_attempt_at timestamptz,
    key text,
    message text NOT NULL,
    detail text,
    hint text,
    context text,
    constraint_name text,
    CONSTRAINT failures_pkey PRIMARY KEY (part, batch_id, item_no),
    CONSTRAINT failures_reason_check CHECK ((state = 'failed') = (reason IS NOT NULL)),
    CONSTRAINT failures_next_check CHECK (state = 'waiting' OR next_attempt_at IS NULL)
) PARTITION BY LIST (part);
CREATE INDEX failures_waiting_idx ON redrive.failures (batch_id, next_attempt_at) WHERE state = 'waiting';

-- Failed attempts of items that were taken up again since.
CREATE TABLE redrive.failure_log (
    part smallint NOT NULL,
    batch_id bigint NOT NULL,
    item_no bigint NOT NULL,
    attempt int NOT NULL,
    run_no int NOT NULL,
    failed_at timestamptz NOT NULL,
    error_class text NOT NULL,
    sqlstate text NOT NULL,
    fingerprint text NOT NULL,
    message text NOT NULL,
    detail text,
    hint text,
    context text,
    constraint_name text
) PARTITION BY LIST (part);
CREATE INDEX failure_log_item_idx ON redrive.failure_log (batch_id, item_no);

-- Fixed partitions, used in turn and truncated when all of it is old: purging
-- never deletes row by row and never creates a table while batches run.
DO $$
BEGIN
    FOR p IN 0 .. (SELECT parts - 1 FROM redrive.rotation) LOOP
        EXECUTE format('CREATE TABLE redrive.item_blocks_%1$s PARTITION OF redrive.item_blocks FOR VALUES IN (%1$s) WITH (toast_tuple_target = 8160)', p);
        EXECUTE format('CREATE TABLE redrive.failures_%1$s PARTITION OF redrive.failures FOR VALUES IN (%1$s) WITH (fillfactor = 90)', p);
        EXECUTE format('CREATE TABLE redrive.failure_log_%1$s PARTITION OF redrive.failure_log FOR VALUES IN (%1$s)', p);
        EXECUTE format('COMMENT ON TABLE redrive.item_blocks_%1$s IS %2$L', p, format('Part %s of item_blocks', p));
        EXECUTE format('COMMENT ON TABLE redrive.failures_%1$s IS %2$L', p, format('Part %s of failures', p));
        EXECUTE format('COMMENT ON TABLE redrive.failure_log_%1$s IS %2$L', p, format('Part %s of failure_log', p));
    END LOOP;
END
$$;

CREATE TABLE redrive.locks (
    handler_id int NOT NULL,
    key text NOT NULL,
    batch_id bigint NOT NULL,
    item_no bigint NOT NULL,
    CONSTRAINT locks_pkey PRIMARY KEY (handler_id, key)
);

CREATE TABLE redrive.callbacks (
    callback_id bigint GENERATED ALWAYS AS IDENTITY,
    handler_id int NOT NULL,
    batch_id bigint NOT NULL,
    kind text NOT NULL,
    key text,
    run_no int NOT NULL,
    failures int NOT NULL DEFAULT 0,
    next_attempt_at timestamptz,
    message text,
    crash_count int NOT NULL DEFAULT 0,
    last_crashed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT callbacks_pkey PRIMARY KEY (callback_id),
    CONSTRAINT callbacks_kind_check CHECK (kind IN ('on_unlock', 'on_finish')),
    CONSTRAINT callbacks_key_check CHECK ((kind = 'on_unlock') = (key IS NOT NULL))
);
CREATE INDEX callbacks_due_idx ON redrive.callbacks (handler_id, next_attempt_at);

-- Items that crashed the server, and with a count of 0 those that may have.
CREATE TABLE redrive.crashes (
    batch_id bigint NOT NULL,
    item_no bigint NOT NULL,
    crash_count int NOT NULL DEFAULT 0,
    first_crashed_at timestamptz NOT NULL,
    last_crashed_at timestamptz NOT NULL,
    CONSTRAINT crashes_pkey PRIMARY KEY (batch_id, item_no)
);

CREATE TABLE redrive.classification_rules (
    rule_id int GENERATED ALWAYS AS IDENTITY,
    handler text,
    priority int NOT NULL DEFAULT 0,
    sqlstate_pattern text,
    constraint_name text,
    message_pattern text,
    error_class text NOT NULL,
    action redrive.rule_action NOT NULL,
    enabled boolean NOT NULL DEFAULT true,
    builtin boolean NOT NULL DEFAULT false,
    hits bigint NOT NULL DEFAULT 0,
    CONSTRAINT classification_rules_pkey PRIMARY KEY (rule_id),
    CONSTRAINT classification_rules_handler_fkey FOREIGN KEY (handler) REFERENCES redrive.handlers (name) ON DELETE CASCADE,
    CONSTRAINT classification_rules_sqlstate_check CHECK (sqlstate_pattern ~ '^[0-9A-Z]{1,5}%?$'),
    CONSTRAINT classification_rules_message_check CHECK (message_pattern IS NULL OR '' ~ message_pattern IS NOT NULL),
    CONSTRAINT classification_rules_class_check CHECK (error_class ~ '^[a-z][a-z0-9_]*$')
);
CREATE UNIQUE INDEX classification_rules_match_idx ON redrive.classification_rules
    (coalesce(handler, ''), priority, coalesce(sqlstate_pattern, ''), coalesce(constraint_name, ''), coalesce(message_pattern, ''));

CREATE TABLE redrive.pass_log (
    pass_id bigint GENERATED ALWAYS AS IDENTITY,
    pass text NOT NULL,
    as_of timestamptz NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    acted bigint NOT NULL,
    more boolean NOT NULL,
    detail text,
    CONSTRAINT pass_log_pkey PRIMARY KEY (pass_id)
);
CREATE INDEX pass_log_started_idx ON redrive.pass_log (started_at);
