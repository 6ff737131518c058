\echo Use "CREATE EXTENSION pg_redrive" to load this file. \quit

-- A schema of this name that is already there is refused: whoever made it
-- could have planted objects in it.
CREATE SCHEMA redrive;
COMMENT ON SCHEMA redrive IS 'pg_redrive: batches of items run, retried and rescued inside the database';
-- Types.  Every state is spelled the same here, in C, in the docs and in the log.

CREATE TYPE redrive.handler_kind AS ENUM ('row', 'set', 'external');
COMMENT ON TYPE redrive.handler_kind IS 'How a handler gets its items: row = one item per call, set = an array of items per call, external = claimed by applications';

CREATE TYPE redrive.handler_signature AS ENUM ('payload', 'key_payload', 'item', 'items');
COMMENT ON TYPE redrive.handler_signature IS 'Arguments of a handler''s function: payload = (jsonb), key_payload = (text, jsonb), item = (redrive.item), items = (redrive.item[])';

CREATE TYPE redrive.isolation_mode AS ENUM ('chunk', 'item');
COMMENT ON TYPE redrive.isolation_mode IS 'chunk = many items per transaction, a good item may be rolled back and run again; item = one transaction per item, each item runs once';

CREATE TYPE redrive.batch_state AS ENUM ('open', 'ready', 'running', 'paused', 'retrying', 'finished', 'cancelled');
COMMENT ON TYPE redrive.batch_state IS 'open -> ready -> running -> retrying -> finished; paused from ready, running or retrying and back; cancelled from any live state; finished -> running by redrive';

CREATE TYPE redrive.chunk_kind AS ENUM ('first', 'retry');
COMMENT ON TYPE redrive.chunk_kind IS 'first = a contiguous range of items that were never attempted, retry = a list of items that failed before';

CREATE TYPE redrive.chunk_state AS ENUM ('running', 'done', 'orphaned');
COMMENT ON TYPE redrive.chunk_state IS 'running -> done or orphaned; orphaned -> running with a new lease token, or done when its batch is cancelled';

CREATE TYPE redrive.failure_state AS ENUM ('waiting', 'failed', 'ignored', 'cancelled');
COMMENT ON TYPE redrive.failure_state IS 'State of an item whose last attempt failed';

CREATE TYPE redrive.fail_reason AS ENUM ('exhausted', 'non_retryable', 'quarantined', 'expired');
COMMENT ON TYPE redrive.fail_reason IS 'Why a failed item is not retried: budget used up, error class says so, crashed the server, waited longer than retry_window';

CREATE TYPE redrive.rule_action AS ENUM ('ignore', 'fail', 'retry', 'retry_free', 'pause');
COMMENT ON TYPE redrive.rule_action IS 'ignore = not run again, counted as ignored; fail = final; retry = costs a retry; retry_free = does not, capped apart; pause = stop the batch, the item stays waiting';

CREATE TYPE redrive.item AS (batch_id bigint, item_no bigint, key text, payload jsonb, attempt int);
COMMENT ON TYPE redrive.item IS 'One item as a handler sees it; attempt counts from 1';

CREATE TYPE redrive.outcome_kind AS ENUM ('ok', 'ignored', 'failed', 'retry', 'snoozed');
COMMENT ON TYPE redrive.outcome_kind IS 'What became of an item: ok; ignored = not run again, counted as ignored; failed = final; retry = again, at the cost of a retry; snoozed = again later, at no cost';

CREATE TYPE redrive.outcome AS (item_no bigint, outcome redrive.outcome_kind, message text, code text, delay interval);
COMMENT ON TYPE redrive.outcome IS 'What a set handler or an external worker says about one item; code is an SQLSTATE or a code of the application, delay is for retry and snoozed';

CREATE TYPE redrive.pass_result AS (
    pass text,
    outcome text,
    acted bigint,
    more boolean,
    detail text
);
COMMENT ON TYPE redrive.pass_result IS 'What a pass did: outcome is done, already running or disabled; acted counts rows changed; more = call again, work is left; detail names the parts';
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
    CONSTRAINT handlers_stale_after_check CHECK (stale_after > interval '0'),
    CONSTRAINT handlers_start_timeout_check CHECK (start_timeout > interval '0'),
    CONSTRAINT handlers_retry_window_check CHECK (retry_window > interval '0'),
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
CREATE INDEX batches_retry_idx ON redrive.batches (handler_id, next_retry_at) WHERE next_retry_at IS NOT NULL;
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

CREATE SEQUENCE redrive.lease_tokens AS bigint;

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
CREATE INDEX chunks_finished_idx ON redrive.chunks (finished_at) WHERE state = 'done';

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
-- Tables of the task centre: what to push, where to, and what came of it.

CREATE TYPE redrive.push_state AS ENUM ('pending', 'in_flight', 'waiting', 'delivered', 'dead', 'blocked');
COMMENT ON TYPE redrive.push_state IS 'pending -> in_flight -> delivered, waiting or dead; waiting -> in_flight when due; blocked = not sent before the configuration of the platform changes; a new version makes it pending again';

CREATE TYPE redrive.breaker_state AS ENUM ('closed', 'open', 'half_open');
COMMENT ON TYPE redrive.breaker_state IS 'closed = pushes are sent; open = none until blocked_until; half_open = a few probes, whose outcome closes or opens it again';

CREATE TYPE redrive.http_method AS ENUM ('POST', 'PUT', 'PATCH', 'GET', 'DELETE');
COMMENT ON TYPE redrive.http_method IS 'Methods of requests';

CREATE TYPE redrive.secret_kind AS ENUM ('signing', 'signing_previous', 'bearer', 'basic');
COMMENT ON TYPE redrive.secret_kind IS 'signing = key of the webhook-signature, signing_previous = the one before it, which signs too while keys are rotated; bearer = token of the Authorization header; basic = user:password';

CREATE TABLE redrive.platforms (
    platform_id int GENERATED ALWAYS AS IDENTITY,
    name text NOT NULL,
    owner regrole NOT NULL,
    url text NOT NULL,
    method redrive.http_method NOT NULL,
    headers jsonb NOT NULL,
    build text,
    success_when jsonpath,
    max_retries int NOT NULL,
    retry_interval interval NOT NULL,
    retry_factor float8 NOT NULL,
    retry_delay_max interval NOT NULL,
    permanent_status int[] NOT NULL,
    push_window interval NOT NULL,
    timeout interval NOT NULL,
    connect_timeout interval NOT NULL,
    lease interval NOT NULL,
    max_in_flight int NOT NULL,
    rate_limit float8,
    allow_http boolean NOT NULL,
    allow_cidr cidr[] NOT NULL,
    paused boolean NOT NULL DEFAULT false,
    config_version bigint NOT NULL DEFAULT 1,
    needs_plan boolean NOT NULL DEFAULT true,
    secrets redrive.secret_kind[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT platforms_pkey PRIMARY KEY (platform_id),
    CONSTRAINT platforms_name_key UNIQUE (name),
    CONSTRAINT platforms_name_check CHECK (name <> '' AND length(name) <= 100),
    CONSTRAINT platforms_max_retries_check CHECK (max_retries BETWEEN 0 AND 1000),
    CONSTRAINT platforms_retry_interval_check CHECK (retry_interval >= interval '0' AND retry_interval <= interval '100 years'),
    CONSTRAINT platforms_retry_factor_check CHECK (retry_factor BETWEEN 1 AND 100),
    CONSTRAINT platforms_retry_delay_max_check CHECK (retry_delay_max >= retry_interval AND retry_delay_max <= interval '100 years'),
    CONSTRAINT platforms_permanent_status_check CHECK (array_position(permanent_status, NULL) IS NULL AND 100 <= ALL (permanent_status) AND 599 >= ALL (permanent_status)),
    CONSTRAINT platforms_push_window_check CHECK (push_window > interval '0' AND push_window <= interval '10 years'),
    CONSTRAINT platforms_timeout_check CHECK (timeout BETWEEN interval '10 ms' AND interval '1 hour'),
    CONSTRAINT platforms_connect_timeout_check CHECK (connect_timeout >= interval '10 ms' AND connect_timeout <= timeout),
    CONSTRAINT platforms_lease_check CHECK (lease >= timeout + interval '30 s' AND lease <= interval '1 day'),
    CONSTRAINT platforms_max_in_flight_check CHECK (max_in_flight BETWEEN 1 AND 10000),
    CONSTRAINT platforms_rate_limit_check CHECK (rate_limit > 0 AND rate_limit <= 1e6),
    CONSTRAINT platforms_allow_cidr_check CHECK (array_position(allow_cidr, NULL) IS NULL)
);
COMMENT ON TABLE redrive.platforms IS 'Where states of tasks are pushed to';

-- Write-only: no view shows it, pg_dump does not keep it.
CREATE TABLE redrive.platform_secrets (
    platform_id int NOT NULL,
    kind redrive.secret_kind NOT NULL,
    secret text NOT NULL,
    set_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT platform_secrets_pkey PRIMARY KEY (platform_id, kind),
    CONSTRAINT platform_secrets_platform_id_fkey FOREIGN KEY (platform_id) REFERENCES redrive.platforms ON DELETE CASCADE
);
COMMENT ON TABLE redrive.platform_secrets IS 'Secrets of platforms; not in any view and not in dumps';

-- What the pusher learns about a platform.  One row each, made with it.
CREATE TABLE redrive.platform_states (
    platform_id int NOT NULL,
    breaker redrive.breaker_state NOT NULL DEFAULT 'closed',
    reason text,
    opened_at timestamptz,
    blocked_until timestamptz,
    times_opened int NOT NULL DEFAULT 0,
    failures_in_row int NOT NULL DEFAULT 0,
    successes_in_row int NOT NULL DEFAULT 0,
    window_started_at timestamptz,
    window_attempts bigint NOT NULL DEFAULT 0,
    window_failures bigint NOT NULL DEFAULT 0,
    in_flight_limit int,
    delivered bigint NOT NULL DEFAULT 0,
    attempts bigint NOT NULL DEFAULT 0,
    last_delivered_at timestamptz,
    last_failed_at timestamptz,
    CONSTRAINT platform_states_pkey PRIMARY KEY (platform_id),
    CONSTRAINT platform_states_platform_id_fkey FOREIGN KEY (platform_id) REFERENCES redrive.platforms ON DELETE CASCADE
) WITH (fillfactor = 30);
COMMENT ON TABLE redrive.platform_states IS 'Circuit breaker and counters of each platform';

CREATE TABLE redrive.tasks (
    task_id bigint GENERATED ALWAYS AS IDENTITY,
    owner regrole NOT NULL,
    task_key text NOT NULL,
    process text,
    status text NOT NULL,
    version bigint NOT NULL DEFAULT 1,
    payload jsonb NOT NULL,
    is_test boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    changed_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT tasks_pkey PRIMARY KEY (task_id),
    CONSTRAINT tasks_owner_task_key_key UNIQUE (owner, task_key),
    CONSTRAINT tasks_task_key_check CHECK (task_key <> '' AND length(task_key) <= 1000),
    CONSTRAINT tasks_status_check CHECK (length(status) <= 1000)
) WITH (fillfactor = 80);
COMMENT ON TABLE redrive.tasks IS 'Tasks of applications: key, status and version. They are pushed to the platforms of their owner';

-- Queue and latest state in one: a row per task and platform.
CREATE TABLE redrive.pushes (
    push_id bigint GENERATED ALWAYS AS IDENTITY,
    task_id bigint NOT NULL,
    platform_id int NOT NULL,
    push_key uuid NOT NULL DEFAULT gen_random_uuid(),
    state redrive.push_state NOT NULL DEFAULT 'pending',
    wanted_version bigint NOT NULL,
    wanted_status text NOT NULL,
    pushed_version bigint,
    pushed_status text,
    retry_count int NOT NULL DEFAULT 0,
    free_count int NOT NULL DEFAULT 0,
    attempt_no bigint NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
    lease_until timestamptz,
    lease_owner bigint,
    sent_version bigint,
    is_probe boolean NOT NULL DEFAULT false,
    awaits_build boolean NOT NULL,
    failed_at timestamptz,
    delivered_at timestamptz,
    http_status int,
    error_class text,
    message text,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT pushes_pkey PRIMARY KEY (push_id),
    CONSTRAINT pushes_task_id_platform_id_key UNIQUE (task_id, platform_id),
    CONSTRAINT pushes_task_id_fkey FOREIGN KEY (task_id) REFERENCES redrive.tasks,
    CONSTRAINT pushes_platform_id_fkey FOREIGN KEY (platform_id) REFERENCES redrive.platforms ON DELETE CASCADE,
    CONSTRAINT pushes_lease_check CHECK ((state = 'in_flight') = (lease_until IS NOT NULL) AND (lease_until IS NULL) = (lease_owner IS NULL)),
    CONSTRAINT pushes_retry_count_check CHECK (retry_count >= 0 AND free_count >= 0)
) WITH (fillfactor = 70);
CREATE INDEX pushes_due_idx ON redrive.pushes (platform_id, next_attempt_at) WHERE state IN ('pending', 'waiting') AND NOT awaits_build;
CREATE INDEX pushes_build_idx ON redrive.pushes (platform_id, next_attempt_at) WHERE state IN ('pending', 'waiting') AND awaits_build;
CREATE INDEX pushes_lease_idx ON redrive.pushes (lease_until) WHERE state = 'in_flight';
COMMENT ON TABLE redrive.pushes IS 'One row per task and platform: what is wanted there, what was delivered, and the next attempt';

-- Bodies made by a platform's build function, in an executor of its owner.
CREATE TABLE redrive.push_bodies (
    push_id bigint NOT NULL,
    version bigint NOT NULL,
    body text NOT NULL,
    built_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT push_bodies_pkey PRIMARY KEY (push_id),
    CONSTRAINT push_bodies_push_id_fkey FOREIGN KEY (push_id) REFERENCES redrive.pushes ON DELETE CASCADE
);
COMMENT ON TABLE redrive.push_bodies IS 'Bodies that build functions made and that were not delivered yet';

CREATE TABLE redrive.push_log (
    part smallint NOT NULL,
    push_id bigint NOT NULL,
    attempt_no bigint NOT NULL,
    platform_id int NOT NULL,
    version bigint NOT NULL,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    delivered boolean NOT NULL,
    charged boolean NOT NULL,
    is_probe boolean NOT NULL,
    error_class text,
    http_status int,
    curl_code int,
    message text,
    response text
) PARTITION BY LIST (part);
COMMENT ON TABLE redrive.push_log IS 'One row per attempt to push, never changed';

DO $$
BEGIN
    FOR i IN 0 .. (SELECT parts - 1 FROM redrive.rotation) LOOP
        EXECUTE format('CREATE TABLE redrive.push_log_%s PARTITION OF redrive.push_log FOR VALUES IN (%s)', i, i);
        EXECUTE format('CREATE INDEX push_log_%s_idx ON redrive.push_log_%s (push_id, attempt_no)', i, i);
        EXECUTE format('CREATE INDEX push_log_%s_time_idx ON redrive.push_log_%s USING brin (finished_at)', i, i);
        EXECUTE format('COMMENT ON TABLE redrive.push_log_%s IS %L', i, 'Part of push_log');
    END LOOP;
END
$$;

CREATE TABLE redrive.http_log (
    http_log_id bigint GENERATED ALWAYS AS IDENTITY,
    requested_at timestamptz NOT NULL,
    requested_by regrole NOT NULL,
    method redrive.http_method NOT NULL,
    host text NOT NULL,
    ok boolean NOT NULL,
    http_status int,
    attempts int NOT NULL,
    milliseconds float8 NOT NULL,
    error text,
    CONSTRAINT http_log_pkey PRIMARY KEY (http_log_id)
);
CREATE INDEX http_log_requested_idx ON redrive.http_log (requested_at);
COMMENT ON TABLE redrive.http_log IS 'Calls of http_request(): to which host, and what came of it; no paths, headers or bodies';
-- Handlers: create, alter, drop, pause, resume.
--
-- The public functions are C: they take the caller's identity where it cannot
-- be forged, look function names up in the caller's search_path, and run the
-- internal function of the same name with the rights of the extension.

CREATE FUNCTION redrive._check_member(p_caller oid, p_owner oid, p_what text) RETURNS void
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF NOT pg_has_role(p_caller, p_owner, 'USAGE') THEN
        RAISE EXCEPTION 'permission denied for %', p_what USING
            ERRCODE = '42501',
            DETAIL = 'It belongs to another role.',
            HINT = 'Ask a member of the owning role, or a superuser.';
    END IF;
END
$$;

CREATE FUNCTION redrive._handler(p_caller oid, p_name text) RETURNS redrive.handlers
LANGUAGE plpgsql STABLE AS $$
DECLARE
    h redrive.handlers;
BEGIN
    IF p_name IS NULL THEN
        RAISE EXCEPTION 'handler name must not be null' USING ERRCODE = '22004',
            HINT = 'Give the name of a handler made with redrive.create_handler().';
    END IF;
    SELECT * INTO h FROM redrive.handlers WHERE name = p_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'handler "%" does not exist', p_name USING ERRCODE = '42704',
            HINT = 'Create it with redrive.create_handler(), or look at redrive.queue_stats for the names there are.';
    END IF;
    PERFORM redrive._check_member(p_caller, h.owner, format('handler "%s"', p_name));
    RETURN h;
END
$$;

CREATE FUNCTION redrive._create_handler(
    p_caller oid, p_signature text,
    p_name text, p_function text, p_kind redrive.handler_kind,
    p_max_retries int, p_retry_delay interval, p_retry_factor float8, p_retry_delay_max interval,
    p_stale_after interval, p_start_timeout interval, p_retry_window interval,
    p_item_timeout interval, p_isolation redrive.isolation_mode, p_commit_interval interval,
    p_max_workers int, p_tolerated_failures int, p_on_unlock text, p_on_finish text, p_notify boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_name text;
    v_constraint text;
    v_column text;
BEGIN
    IF EXISTS (SELECT FROM redrive.handlers WHERE name = p_name) THEN
        RAISE EXCEPTION 'handler "%" already exists', p_name USING ERRCODE = '42710',
            HINT = 'Change it with redrive.alter_handler(), or choose another name.';
    END IF;
    INSERT INTO redrive.handlers (
        name, kind, owner, function, signature, max_retries, retry_delay, retry_factor, retry_delay_max,
        stale_after, start_timeout, retry_window, item_timeout, isolation, commit_interval,
        max_workers, tolerated_failures, on_unlock, on_finish, notify)
    VALUES (
        p_name, p_kind, p_caller, p_function, p_signature::redrive.handler_signature, p_max_retries, p_retry_delay, p_retry_factor, p_retry_delay_max,
        p_stale_after, p_start_timeout, p_retry_window, p_item_timeout, p_isolation, p_commit_interval,
        p_max_workers, p_tolerated_failures, p_on_unlock, p_on_finish, p_notify);
EXCEPTION
    WHEN check_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        PERFORM redrive._bad_policy(v_constraint);
    WHEN not_null_violation THEN
        GET STACKED DIAGNOSTICS v_column = COLUMN_NAME;
        RAISE EXCEPTION '% must not be null', v_column USING ERRCODE = '22004',
            HINT = 'Leave the argument out to get its default.';
END
$$;

CREATE FUNCTION redrive._bad_policy(p_constraint text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_column text := substring(p_constraint FROM '^handlers_(.*)_check$');
BEGIN
    RAISE EXCEPTION 'invalid value for "%"', v_column USING ERRCODE = '22023',
        DETAIL = format('The rule is %s.', (SELECT substring(pg_get_constraintdef(oid, true) FROM 'CHECK \((.*)\)')
            FROM pg_constraint WHERE conrelid = 'redrive.handlers'::regclass AND conname = p_constraint)),
        HINT = 'See redrive.create_handler() for units and defaults.';
END
$$;

CREATE FUNCTION redrive._alter_handler(
    p_caller oid, p_signature text,
    p_name text, p_function text, p_kind redrive.handler_kind,
    p_max_retries int, p_retry_delay interval, p_retry_factor float8, p_retry_delay_max interval,
    p_stale_after interval, p_start_timeout interval, p_retry_window interval,
    p_item_timeout interval, p_isolation redrive.isolation_mode, p_commit_interval interval,
    p_max_workers int, p_tolerated_failures int, p_on_unlock text, p_on_finish text, p_unset text[], p_notify boolean) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    h redrive.handlers := redrive._handler(p_caller, p_name);
    v_unset text[] := coalesce(p_unset, '{}');
    v_wrong text;
    v_constraint text;
BEGIN
    IF p_kind <> h.kind THEN
        RAISE EXCEPTION 'cannot change the kind of handler "%"', p_name USING ERRCODE = '0A000',
            DETAIL = format('It is "%s".', h.kind), HINT = 'Create another handler.';
    END IF;
    IF h.kind = 'external' AND p_function IS NOT NULL THEN
        RAISE EXCEPTION 'handler "%" has no function', p_name USING ERRCODE = '22023',
            DETAIL = 'Its kind is "external".', HINT = 'Its items are claimed by applications with redrive.claim().';
    END IF;
    SELECT u INTO v_wrong FROM unnest(v_unset) AS u
    WHERE u IS NULL OR u NOT IN ('retry_delay', 'item_timeout', 'max_workers', 'tolerated_failures', 'on_unlock', 'on_finish')
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'cannot unset "%"', coalesce(v_wrong, 'NULL') USING ERRCODE = '22023',
            HINT = 'These can be unset: retry_delay, item_timeout, max_workers, tolerated_failures, on_unlock, on_finish.';
    END IF;
    UPDATE redrive.handlers SET
        function = coalesce(p_function, function),
        signature = coalesce(p_signature::redrive.handler_signature, signature),
        max_retries = coalesce(p_max_retries, max_retries),
        retry_delay = CASE WHEN 'retry_delay' = ANY (v_unset) THEN NULL ELSE coalesce(p_retry_delay, retry_delay) END,
        retry_factor = coalesce(p_retry_factor, retry_factor),
        retry_delay_max = coalesce(p_retry_delay_max, retry_delay_max),
        stale_after = coalesce(p_stale_after, stale_after),
        start_timeout = coalesce(p_start_timeout, start_timeout),
        retry_window = coalesce(p_retry_window, retry_window),
        item_timeout = CASE WHEN 'item_timeout' = ANY (v_unset) THEN NULL ELSE coalesce(p_item_timeout, item_timeout) END,
        isolation = coalesce(p_isolation, isolation),
        commit_interval = coalesce(p_commit_interval, commit_interval),
        max_workers = CASE WHEN 'max_workers' = ANY (v_unset) THEN NULL ELSE coalesce(p_max_workers, max_workers) END,
        tolerated_failures = CASE WHEN 'tolerated_failures' = ANY (v_unset) THEN NULL ELSE coalesce(p_tolerated_failures, tolerated_failures) END,
        on_unlock = CASE WHEN 'on_unlock' = ANY (v_unset) THEN NULL ELSE coalesce(p_on_unlock, on_unlock) END,
        on_finish = CASE WHEN 'on_finish' = ANY (v_unset) THEN NULL ELSE coalesce(p_on_finish, on_finish) END,
        notify = coalesce(p_notify, notify)
    WHERE handler_id = h.handler_id;
    PERFORM redrive._wake(h.owner);
EXCEPTION WHEN check_violation THEN
    GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
    PERFORM redrive._bad_policy(v_constraint);
END
$$;

CREATE FUNCTION redrive._drop_handler(p_caller oid, p_name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    h redrive.handlers := redrive._handler(p_caller, p_name);
    v_live bigint;
    v_sample bigint;
BEGIN
    -- The lock makes submitters wait: their foreign key check needs the row.
    PERFORM FROM redrive.handlers WHERE handler_id = h.handler_id FOR UPDATE;
    SELECT count(*), min(batch_id) INTO v_live, v_sample
    FROM redrive.batches
    WHERE handler_id = h.handler_id AND state NOT IN ('finished', 'cancelled');
    IF v_live > 0 THEN
        RAISE EXCEPTION 'cannot drop handler "%" because it has live batches', p_name USING ERRCODE = '55006',
            DETAIL = format('%s batches are not finished, the oldest is %s.', v_live, v_sample),
            HINT = 'Wait for them, or cancel them with redrive.cancel_batch().';
    END IF;
    -- A cancelled batch may still have a worker in its last item.
    IF EXISTS (SELECT FROM redrive.chunks WHERE handler_id = h.handler_id AND state = 'running') THEN
        RAISE EXCEPTION 'cannot drop handler "%" because a worker is running it', p_name USING ERRCODE = '55006',
            HINT = 'Look at redrive.workers and try again when it is gone.';
    END IF;
    DELETE FROM redrive.callbacks WHERE handler_id = h.handler_id;
    DELETE FROM redrive.locks WHERE handler_id = h.handler_id;
    DELETE FROM redrive.crashes x USING redrive.batches b WHERE b.handler_id = h.handler_id AND x.batch_id = b.batch_id;
    DELETE FROM redrive.failure_log l USING redrive.batches b WHERE b.handler_id = h.handler_id AND l.part = b.part AND l.batch_id = b.batch_id;
    DELETE FROM redrive.failures f USING redrive.batches b WHERE b.handler_id = h.handler_id AND f.part = b.part AND f.batch_id = b.batch_id;
    DELETE FROM redrive.item_blocks i USING redrive.batches b WHERE b.handler_id = h.handler_id AND i.part = b.part AND i.batch_id = b.batch_id;
    DELETE FROM redrive.canaries c USING redrive.batches b WHERE b.handler_id = h.handler_id AND c.batch_id = b.batch_id;
    DELETE FROM redrive.retry_lists l USING redrive.chunks c WHERE c.handler_id = h.handler_id AND l.chunk_id = c.chunk_id;
    DELETE FROM redrive.chunks c USING redrive.batches b WHERE b.handler_id = h.handler_id AND c.batch_id = b.batch_id;
    DELETE FROM redrive.batches WHERE handler_id = h.handler_id;
    DELETE FROM redrive.handlers WHERE handler_id = h.handler_id;
END
$$;

CREATE FUNCTION redrive._pause_handler(p_caller oid, p_name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    h redrive.handlers := redrive._handler(p_caller, p_name);
BEGIN
    UPDATE redrive.handlers SET paused = true WHERE handler_id = h.handler_id;
END
$$;

CREATE FUNCTION redrive._resume_handler(p_caller oid, p_name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    h redrive.handlers := redrive._handler(p_caller, p_name);
BEGIN
    UPDATE redrive.handlers SET paused = false WHERE handler_id = h.handler_id;
    PERFORM redrive._wake(h.owner), redrive._notify(h.handler_id);
END
$$;

CREATE FUNCTION redrive.create_handler(
    name text, function text DEFAULT NULL, kind redrive.handler_kind DEFAULT 'row',
    max_retries int DEFAULT 3, retry_delay interval DEFAULT '1 min', retry_factor float8 DEFAULT 2, retry_delay_max interval DEFAULT '1 h',
    stale_after interval DEFAULT '10 min', start_timeout interval DEFAULT '1 h', retry_window interval DEFAULT '24 h',
    item_timeout interval DEFAULT NULL, isolation redrive.isolation_mode DEFAULT 'chunk',
    commit_interval interval DEFAULT '250 ms', max_workers int DEFAULT NULL, tolerated_failures int DEFAULT NULL,
    on_unlock text DEFAULT NULL, on_finish text DEFAULT NULL, notify boolean DEFAULT false) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_create_handler';
COMMENT ON FUNCTION redrive.create_handler IS
'Create a handler owned by the caller. function: a name, or a name with argument types, of a function of (payload jsonb), (key text, payload jsonb) or (item redrive.item); for kind set, of (items redrive.item[]) that returns void or SETOF redrive.outcome. max_retries 3 means 4 attempts. retry_delay NULL = failures wait for the retry_failed pass. on_unlock(key text) is called when an item''s key is unlocked, on_finish(batch_id bigint, run_no int) when a batch ends. notify, for kind external: NOTIFY redrive_<name> when there is something to claim. Errors: 42710 name taken, 42883 no such function, 42725 several fit, 22023 value out of range, 42501 no EXECUTE.';

CREATE FUNCTION redrive.alter_handler(
    name text, function text DEFAULT NULL, kind redrive.handler_kind DEFAULT NULL,
    max_retries int DEFAULT NULL, retry_delay interval DEFAULT NULL, retry_factor float8 DEFAULT NULL, retry_delay_max interval DEFAULT NULL,
    stale_after interval DEFAULT NULL, start_timeout interval DEFAULT NULL, retry_window interval DEFAULT NULL,
    item_timeout interval DEFAULT NULL, isolation redrive.isolation_mode DEFAULT NULL,
    commit_interval interval DEFAULT NULL, max_workers int DEFAULT NULL, tolerated_failures int DEFAULT NULL,
    on_unlock text DEFAULT NULL, on_finish text DEFAULT NULL, unset text[] DEFAULT NULL, notify boolean DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_alter_handler';
COMMENT ON FUNCTION redrive.alter_handler IS
'Change a handler. NULL leaves a setting unchanged; unset lists settings to make NULL, for example ARRAY[''item_timeout'']. Takes effect with the next chunk. Errors: 42704 unknown, 42501 not yours, 22023 value out of range.';

CREATE FUNCTION redrive.drop_handler(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.drop_handler IS
'Drop a handler with the records of its ended batches. Errors: 55006 while batches live, 42704 unknown, 42501 not yours.';

CREATE FUNCTION redrive.pause_handler(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.pause_handler IS
'Claim nothing more for this handler; chunks that run are finished. Errors: 42704 unknown, 42501 not yours.';

CREATE FUNCTION redrive.resume_handler(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.resume_handler IS
'Undo pause_handler. Errors: 42704 unknown, 42501 not yours.';
-- Submit: everything is part of the caller's transaction.

CREATE FUNCTION redrive._wake(role oid) RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'redrive__wake';

CREATE FUNCTION redrive._wake_supervisor() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive__wake_supervisor';

-- The same if it would sleep longer than to this time.
CREATE FUNCTION redrive._wake_supervisor_by(at timestamptz) RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'redrive__wake_supervisor_by';

CREATE FUNCTION redrive.submit(handler text, payloads jsonb[], keys text[] DEFAULT NULL, run_at timestamptz DEFAULT NULL,
    priority int DEFAULT 0, label text DEFAULT NULL, idempotency_key text DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_submit';
COMMENT ON FUNCTION redrive.submit IS
'Submit a sealed batch, one item per payload, and return its batch_id. keys: the application''s own identifiers, NULL elements allowed; each key is locked until its item is final. run_at: not before this time. priority: higher first. With an idempotency_key that was used before for this handler the earlier batch_id is returned and nothing is submitted. Errors: 42704 unknown handler, 42501 not yours, 22004 NULL payload, 22023 empty or arrays of different length, 55P03 key locked by another batch.';

CREATE FUNCTION redrive.submit_query(handler text, query text, run_at timestamptz DEFAULT NULL,
    priority int DEFAULT 0, label text DEFAULT NULL, idempotency_key text DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_submit_query';
COMMENT ON FUNCTION redrive.submit_query IS
'Submit a sealed batch of the rows of a query that yields (key text, payload jsonb). The query runs as the caller. Errors: those of submit, and 42804 when the columns do not fit.';

CREATE FUNCTION redrive.open_batch(handler text, run_at timestamptz DEFAULT NULL,
    priority int DEFAULT 0, label text DEFAULT NULL, idempotency_key text DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_open_batch';
COMMENT ON FUNCTION redrive.open_batch IS
'Open a batch to fill with add_items and end with seal_batch; nothing runs before that. Errors: 42704 unknown handler, 42501 not yours.';

CREATE FUNCTION redrive.add_items(batch_id bigint, payloads jsonb[], keys text[] DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_add_items';
COMMENT ON FUNCTION redrive.add_items IS
'Add items to an open batch and return how many it has so far. Errors: 42704 unknown batch, 55000 not open, those of submit.';

CREATE FUNCTION redrive.send(handler text, payload jsonb, key text DEFAULT NULL, delay interval DEFAULT NULL, run_at timestamptz DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_send';
COMMENT ON FUNCTION redrive.send IS
'Send one item, at once, after a delay, or at a set time; return its batch_id. Nothing is visible or run if the caller rolls back. Errors: those of submit, and 22023 when delay and run_at are both given.';

CREATE FUNCTION redrive._seal_batch(p_caller oid, p_batch_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
    v_owner oid;
BEGIN
    IF b.state <> 'open' THEN
        RAISE EXCEPTION 'batch % is not open', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Only an open batch can be sealed, once.';
    END IF;
    UPDATE redrive.batches
    SET state = 'ready', sealed_at = clock_timestamp(), last_progress_at = clock_timestamp()
    WHERE batch_id = p_batch_id;
    IF b.total = 0 THEN
        UPDATE redrive.batches SET state = 'running', started_at = clock_timestamp() WHERE batch_id = p_batch_id;
        PERFORM redrive._fold(p_batch_id);
    END IF;
    SELECT owner INTO v_owner FROM redrive.handlers WHERE handler_id = b.handler_id;
    PERFORM redrive._wake(v_owner), redrive._notify(b.handler_id);
END
$$;

CREATE FUNCTION redrive.seal_batch(batch_id bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.seal_batch IS
'Seal an open batch: no more items, ready to run; an empty one is finished at once. Errors: 42704 unknown batch, 42501 not yours, 55000 not open.';

CREATE FUNCTION redrive._lock_batch(p_caller oid, p_batch_id bigint) RETURNS redrive.batches
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches;
    v_owner oid;
BEGIN
    SELECT * INTO b FROM redrive.batches WHERE batch_id = p_batch_id FOR UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'batch % does not exist', coalesce(p_batch_id::text, 'NULL') USING ERRCODE = '42704',
            HINT = 'See redrive.batch_progress for the batches there are.';
    END IF;
    SELECT owner INTO v_owner FROM redrive.handlers WHERE handler_id = b.handler_id;
    PERFORM redrive._check_member(p_caller, v_owner, format('batch %s', p_batch_id));
    RETURN b;
END
$$;

CREATE FUNCTION redrive._is_locked(p_caller oid, p_handler text, p_key text) RETURNS boolean
LANGUAGE plpgsql STABLE AS $$
DECLARE
    h redrive.handlers := redrive._handler(p_caller, p_handler);
BEGIN
    RETURN EXISTS (SELECT FROM redrive.locks WHERE handler_id = h.handler_id AND key = p_key);
END
$$;

CREATE FUNCTION redrive.is_locked(handler text, key text) RETURNS boolean
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.is_locked IS
'Whether a live item of this handler holds the key. Errors: 42704 unknown handler, 42501 not yours.';
-- Claim: what a worker takes, in a short transaction of its own.

-- The best candidate of each kind of work of a handler: a few index probes,
-- whatever the number of batches.
CREATE FUNCTION redrive._work(p_handler_id int, p_as_of timestamptz)
RETURNS TABLE (work text, batch_id bigint, priority int, due timestamptz)
LANGUAGE sql STABLE AS $$
    (SELECT 'orphan', b.batch_id, b.priority, b.serve_after
     FROM redrive.chunks AS c
     JOIN redrive.batches AS b ON b.batch_id = c.batch_id
     WHERE c.handler_id = $1 AND c.state = 'orphaned' AND b.state IN ('running', 'retrying')
     ORDER BY b.priority DESC, b.serve_after
     LIMIT 1)
    UNION ALL
    (SELECT 'first', b.batch_id, b.priority, b.serve_after
     FROM redrive.batches AS b
     -- somebody may have claimed of it, and committed, since we looked at the clock
     WHERE b.handler_id = $1 AND b.claimable AND b.serve_after <= greatest($2, (SELECT clock_timestamp()))
     ORDER BY b.priority DESC, b.serve_after
     LIMIT 1)
    UNION ALL
    (SELECT 'retry', b.batch_id, b.priority, b.next_retry_at
     FROM redrive.batches AS b
     WHERE b.handler_id = $1 AND b.next_retry_at <= $2 AND b.state IN ('running', 'retrying')
     ORDER BY b.next_retry_at
     LIMIT 1)
    UNION ALL
    (SELECT 'callback', k.batch_id, 2147483647, k.next_attempt_at
     FROM redrive.callbacks AS k
     WHERE k.handler_id = $1 AND k.next_attempt_at <= $2
     LIMIT 1)
$$;

-- What our own workers can do, of all handlers and platforms that are not paused.
CREATE FUNCTION redrive._candidates(p_as_of timestamptz)
RETURNS TABLE (handler_id int, owner oid, work text, priority int, due timestamptz)
LANGUAGE sql STABLE AS $$
    SELECT h.handler_id, h.owner::oid, w.work, w.priority, w.due
    FROM redrive.handlers AS h
    CROSS JOIN LATERAL redrive._work(h.handler_id, $1) AS w
    WHERE (h.kind <> 'external' OR w.work = 'callback') AND NOT h.paused
      AND (h.max_workers IS NULL OR w.work = 'callback'
           OR h.max_workers > (SELECT count(*) FROM redrive.chunks AS r WHERE r.handler_id = h.handler_id AND r.state = 'running'))
    UNION ALL
    -- bodies of pushes
    SELECT NULL, p.owner::oid, 'build', 2147483647, u.next_attempt_at
    FROM redrive.platforms AS p
    CROSS JOIN LATERAL (
        SELECT x.next_attempt_at
        FROM redrive.pushes AS x
        WHERE x.platform_id = p.platform_id AND x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at <= $1
        ORDER BY x.next_attempt_at
        LIMIT 1) AS u
    WHERE p.build IS NOT NULL AND NOT p.paused
$$;

-- When the next work that is not due yet becomes due.
CREATE FUNCTION redrive._next_due(p_as_of timestamptz) RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT least(
        (SELECT min(b.serve_after) FROM redrive.batches AS b WHERE b.claimable AND b.serve_after > p_as_of),
        (SELECT min(w.due)
         FROM redrive.handlers AS h
         CROSS JOIN LATERAL (
            (SELECT b.next_retry_at AS due
             FROM redrive.batches AS b
             WHERE b.handler_id = h.handler_id AND b.next_retry_at > p_as_of
             ORDER BY b.next_retry_at
             LIMIT 1)
            UNION ALL
            (SELECT k.next_attempt_at
             FROM redrive.callbacks AS k
             WHERE k.handler_id = h.handler_id AND k.next_attempt_at > p_as_of
             ORDER BY k.next_attempt_at
             LIMIT 1)) AS w
         WHERE NOT h.paused),
        (SELECT min(u.next_attempt_at)
         FROM redrive.platforms AS p
         CROSS JOIN LATERAL (
            SELECT x.next_attempt_at
            FROM redrive.pushes AS x
            WHERE x.platform_id = p.platform_id AND x.awaits_build AND x.state IN ('pending', 'waiting') AND x.next_attempt_at > p_as_of
            ORDER BY x.next_attempt_at
            LIMIT 1) AS u
         WHERE p.build IS NOT NULL AND NOT p.paused))
$$;

-- Take one chunk for a worker of p_owner: by priority, then the work that has
-- been due longest; of a batch an orphaned chunk first.  Returns no row when
-- there is nothing to do.  The batch row is locked to the end of the caller's
-- (short) transaction; batches that another session has locked are skipped.
-- p_workers: how many workers may share a batch, so that none takes all of it.
-- p_callbacks: return a row of NULLs when callbacks or builds are due, which come before any chunk.
CREATE FUNCTION redrive._claim(p_owner oid, p_pid int, p_started_at timestamptz, p_workers int, p_callbacks boolean)
RETURNS TABLE (
    chunk_id bigint, batch_id bigint, handler_id int, part smallint, run_no int, kind redrive.chunk_kind,
    done_to bigint, to_no bigint, items bigint, lease_token bigint, rescue_count int, keyed boolean, more boolean)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    cand record;
    h redrive.handlers;
    b redrive.batches;
    c redrive.chunks;
    n bigint;
    v_due bigint[];
BEGIN
    FOR cand IN
        SELECT x.handler_id, x.work FROM redrive._candidates(v_now) AS x
        WHERE x.owner = p_owner AND (p_callbacks OR x.work NOT IN ('callback', 'build'))
        ORDER BY x.priority DESC, x.due, x.work = 'orphan' DESC
    LOOP
        IF cand.work IN ('callback', 'build') THEN
            RETURN NEXT;
            RETURN;
        END IF;
        SELECT * INTO h FROM redrive.handlers AS x WHERE x.handler_id = cand.handler_id;
        IF h.max_workers IS NOT NULL THEN
            PERFORM FROM redrive.handlers AS x WHERE x.handler_id = cand.handler_id FOR NO KEY UPDATE;
            CONTINUE WHEN h.max_workers <= (SELECT count(*) FROM redrive.chunks AS r WHERE r.handler_id = h.handler_id AND r.state = 'running');
        END IF;

        IF cand.work = 'orphan' THEN
            SELECT r.* INTO c
            FROM redrive.chunks AS r
            JOIN redrive.batches AS s ON s.batch_id = r.batch_id
            WHERE r.handler_id = cand.handler_id AND r.state = 'orphaned' AND s.state IN ('running', 'retrying')
            ORDER BY s.priority DESC, s.serve_after, r.chunk_id
            LIMIT 1
            FOR UPDATE OF s, r SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            UPDATE redrive.batches AS s SET serve_after = v_now WHERE s.batch_id = c.batch_id RETURNING * INTO b;
            n := redrive._chunk_size(b, p_workers, c.to_no - c.done_to);
            IF c.kind = 'first' AND c.to_no - c.done_to > 2 * n THEN
                -- too much for one worker: keep a part, leave the rest
                INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, claimed_at, progress_at)
                VALUES (c.batch_id, c.handler_id, c.part, c.run_no, 'first', 'orphaned', c.done_to + n + 1, c.to_no, c.done_to + n, c.to_no - c.done_to - n, c.claimed_at, c.progress_at);
                c.items := c.items - (c.to_no - c.done_to - n);
                c.to_no := c.done_to + n;
            END IF;
            UPDATE redrive.chunks AS r
            SET state = 'running', lease_token = nextval('redrive.lease_tokens'), worker_pid = p_pid, worker_started_at = p_started_at,
                to_no = c.to_no, items = c.items, claim_done = r.done, claimed_at = v_now, progress_at = v_now
            WHERE r.chunk_id = c.chunk_id
            RETURNING r.* INTO c;
            RETURN QUERY SELECT c.chunk_id, c.batch_id, c.handler_id, c.part, c.run_no, c.kind,
                c.done_to, c.to_no, c.items - c.done, c.lease_token, c.rescue_count, b.keyed, true;
            RETURN;
        END IF;

        IF cand.work = 'first' THEN
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = cand.handler_id AND s.claimable AND s.serve_after <= v_now
            ORDER BY s.priority DESC, s.serve_after
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            RETURN QUERY SELECT * FROM redrive._carve(b, p_pid, p_started_at, p_workers, v_now);
            RETURN;
        ELSE
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = cand.handler_id AND s.next_retry_at <= v_now AND s.state IN ('running', 'retrying')
            ORDER BY s.next_retry_at
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            CONTINUE WHEN NOT FOUND;
            SELECT array_agg(d.item_no ORDER BY d.item_no) INTO v_due
            FROM (
                SELECT f.item_no
                FROM redrive.failures AS f
                WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting' AND f.next_attempt_at <= v_now
                ORDER BY f.next_attempt_at
                LIMIT redrive._retry_size(b, p_workers, 1000000000)
            ) AS d;
            IF v_due IS NOT NULL THEN
                c := redrive._take_up(b, v_due, NULL, p_pid, p_started_at);
            END IF;
            UPDATE redrive.batches AS s
            SET next_retry_at = (SELECT min(f.next_attempt_at) FROM redrive.failures AS f
                                 WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'),
                last_progress_at = v_now
            WHERE s.batch_id = b.batch_id;
            CONTINUE WHEN v_due IS NULL;
        END IF;
        RETURN QUERY SELECT c.chunk_id, c.batch_id, c.handler_id, c.part, c.run_no, c.kind,
            c.done_to, c.to_no, c.items, c.lease_token, c.rescue_count, b.keyed, c.items >= 1000;
        RETURN;
    END LOOP;
END
$$;

-- Carve the next range off a batch whose row the caller has locked.
CREATE FUNCTION redrive._carve(b redrive.batches, p_pid int, p_started_at timestamptz, p_workers int, p_now timestamptz)
RETURNS TABLE (
    chunk_id bigint, batch_id bigint, handler_id int, part smallint, run_no int, kind redrive.chunk_kind,
    done_to bigint, to_no bigint, items bigint, lease_token bigint, rescue_count int, keyed boolean, more boolean)
LANGUAGE plpgsql AS $$
DECLARE
    n bigint := redrive._chunk_size(b, p_workers, b.total - b.claimed_to);
BEGIN
    UPDATE redrive.batches AS s
    SET state = 'running', claimed_to = s.claimed_to + n, serve_after = p_now, last_progress_at = p_now,
        started_at = coalesce(s.started_at, p_now)
    WHERE s.batch_id = b.batch_id;
    RETURN QUERY
    INSERT INTO redrive.chunks AS c (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,
        lease_token, worker_pid, worker_started_at, claimed_at, progress_at)
    VALUES (b.batch_id, b.handler_id, b.part, b.run_no, 'first', 'running', b.claimed_to + 1, b.claimed_to + n, b.claimed_to, n,
        nextval('redrive.lease_tokens'), p_pid, p_started_at, p_now, p_now)
    RETURNING c.chunk_id, c.batch_id, c.handler_id, c.part, c.run_no, c.kind,
        c.done_to, c.to_no, c.items, c.lease_token, c.rescue_count, b.keyed, c.to_no < b.total;
END
$$;

-- How many items a chunk gets: about two seconds of work at the measured rate,
-- and no more than half of an even share, so that workers end together.
CREATE FUNCTION redrive._chunk_size(b redrive.batches, p_workers int, p_left bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT greatest(1, least(
        p_left,
        greatest(ceil(least(2 * coalesce(b.items_per_second, 50), 100000)), 1)::bigint,
        greatest(ceil(p_left / (2.0 * greatest(p_workers, 1))), ceil(least(0.1 * coalesce(b.items_per_second, 50), 10000)))::bigint))
$$;

-- How many items a retry chunk gets: its list is held in memory.
CREATE FUNCTION redrive._retry_size(b redrive.batches, p_workers int, p_left bigint) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT least(20000, redrive._chunk_size(b, p_workers, p_left))
$$;

-- Take failures up again: their rows go to the log, the items to the list of a
-- new chunk.  What succeeds then leaves nothing to write, what fails again is a
-- new failure.  The caller has locked the batch.  Without a worker the chunk is
-- orphaned, for the next one to claim.  p_afresh: a redrive began then, and the
-- items have their retries and their time again.  The numbers are in order.
CREATE FUNCTION redrive._take_up(b redrive.batches, p_item_nos bigint[], p_afresh timestamptz, p_pid int, p_started_at timestamptz) RETURNS redrive.chunks
LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan -- else a plan made for a small table compares each row with each number
AS $$
DECLARE
    c redrive.chunks;
    v_chunk_id bigint := nextval(pg_get_serial_sequence('redrive.chunks', 'chunk_id'));
    v_now timestamptz := clock_timestamp();
BEGIN
    WITH taken AS (
        DELETE FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (p_item_nos)
          AND f.item_no BETWEEN p_item_nos[1] AND p_item_nos[cardinality(p_item_nos)]
        RETURNING f.*
    ), logged AS (
        INSERT INTO redrive.failure_log (part, batch_id, item_no, attempt, run_no, failed_at, error_class, sqlstate,
            fingerprint, message, detail, hint, context, constraint_name)
        SELECT t.part, t.batch_id, t.item_no, t.attempts, t.run_no, t.last_failed_at, t.error_class, t.sqlstate,
            t.fingerprint, t.message, t.detail, t.hint, t.context, t.constraint_name
        FROM taken AS t
    ), list AS (
        INSERT INTO redrive.retry_lists (chunk_id, item_nos, attempts, free_counts, first_failed_at)
        SELECT v_chunk_id, array_agg(t.item_no), array_agg(t.attempts), array_agg(t.free_count), array_agg(t.first_failed_at)
        FROM (
            SELECT x.item_no, x.attempts,
                CASE WHEN p_afresh IS NULL THEN x.free_count ELSE x.attempts END AS free_count,
                coalesce(p_afresh, x.first_failed_at) AS first_failed_at
            FROM taken AS x
            ORDER BY x.item_no
        ) AS t
        RETURNING item_nos
    )
    INSERT INTO redrive.chunks AS k (chunk_id, batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, waiting,
        lease_token, worker_pid, worker_started_at, claimed_at, progress_at)
    OVERRIDING SYSTEM VALUE
    SELECT v_chunk_id, b.batch_id, b.handler_id, b.part, b.run_no, 'retry',
        CASE WHEN p_pid IS NULL THEN 'orphaned'::redrive.chunk_state ELSE 'running' END,
        l.item_nos[1], l.item_nos[n.items], l.item_nos[1] - 1, n.items, CASE WHEN p_afresh IS NULL THEN -n.items ELSE 0 END,
        CASE WHEN p_pid IS NOT NULL THEN nextval('redrive.lease_tokens') END, p_pid, p_started_at, v_now, v_now
    FROM list AS l CROSS JOIN LATERAL (SELECT cardinality(l.item_nos) AS items) AS n
    RETURNING k.* INTO STRICT c;
    RETURN c;
END
$$;
-- Crashes: items that took the server down.

-- What the postmaster found in the file of crumbs when it started (crumbs.c),
-- for this database, until the supervisor has recorded it.
--   item, unlock  the handler, or on_unlock, of item "id" was executed when its process died
--   callback      callback "id" was
--   build         the build function of push "id"'s platform was
--   segment       the process died in or after several items, the last of which is "id"
--   innocent      the process was taken down because of another one
--   suspect       everything was killed, the postmaster too, while item "id" was executed
--   unknown       the file was lost
CREATE FUNCTION redrive._crumbs()
RETURNS TABLE (kind text, batch_id bigint, chunk_id bigint, lease_token bigint, id bigint, crashed_at timestamptz)
LANGUAGE c VOLATILE ROWS 10 AS 'MODULE_PATHNAME', 'redrive__crumbs';

-- One of the items of a batch from p_from to p_to may have crashed the server: have
-- each of them run alone, and if it does crash the server, count it twice.
-- p_chunk_id: a retry chunk, which has some of these items only.
CREATE FUNCTION redrive._suspect(p_batch_id bigint, p_from bigint, p_to bigint, p_chunk_id bigint, p_crashed_at timestamptz) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO redrive.crashes (batch_id, item_no, first_crashed_at, last_crashed_at)
    SELECT b.batch_id, i.item_no, $5, $5
    FROM redrive.batches AS b
    CROSS JOIN LATERAL (
        SELECT g FROM generate_series(greatest($2, 1), least($3, b.total)) AS g
        WHERE NOT EXISTS (SELECT FROM redrive.retry_lists AS l WHERE l.chunk_id = $4)
        UNION ALL
        SELECT u FROM redrive.retry_lists AS l CROSS JOIN LATERAL unnest(l.item_nos) AS u
        WHERE l.chunk_id = $4 AND u BETWEEN $2 AND $3
    ) AS i (item_no)
    WHERE b.batch_id = $1
    ORDER BY i.item_no
    LIMIT 2000 -- a commit interval has no more
    ON CONFLICT DO NOTHING
$$;

-- Turn the verdicts into rows; called before any chunk is taken from a lost worker.
-- Doing it again changes nothing: each crash has a time of its own.  A chunk
-- need not be there: a crash may have swallowed its claim.
-- Writes crashes, callbacks and platforms.
CREATE FUNCTION redrive._blame() RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    k record;
BEGIN
    FOR k IN SELECT * FROM redrive._crumbs() AS x WHERE x.kind <> 'innocent' ORDER BY x.crashed_at LOOP
        CASE k.kind
            WHEN 'callback' THEN
                UPDATE redrive.callbacks AS x
                SET crash_count = x.crash_count + 1, last_crashed_at = k.crashed_at, failures = x.failures + 1,
                    message = 'the callback crashed the server',
                    next_attempt_at = CASE WHEN x.crash_count = 0 THEN clock_timestamp() END
                WHERE x.callback_id = k.id AND (x.last_crashed_at IS NULL OR x.last_crashed_at < k.crashed_at);
            WHEN 'build' THEN
                -- until somebody has mended the function, and resumes the platform
                UPDATE redrive.platforms AS p SET paused = true
                FROM redrive.pushes AS u
                WHERE u.push_id = k.id AND p.platform_id = u.platform_id;
                UPDATE redrive.platform_states AS s SET reason = 'its build function crashed the server'
                FROM redrive.pushes AS u
                WHERE u.push_id = k.id AND s.platform_id = u.platform_id;
                UPDATE redrive.pushes AS u SET failed_at = k.crashed_at, error_class = 'build', message = 'The build function crashed the server.'
                WHERE u.push_id = k.id;
            WHEN 'segment' THEN
                PERFORM redrive._suspect(k.batch_id, coalesce((SELECT c.done_to + 1 FROM redrive.chunks AS c WHERE c.chunk_id = k.chunk_id), k.id - 1999),
                    k.id, k.chunk_id, k.crashed_at);
            WHEN 'suspect' THEN
                PERFORM redrive._suspect(k.batch_id, k.id, k.id, NULL, k.crashed_at);
            WHEN 'unknown' THEN
                PERFORM redrive._suspect(c.batch_id, c.done_to + 1, c.to_no, c.chunk_id, k.crashed_at)
                FROM redrive.chunks AS c
                WHERE c.state = 'running' AND c.worker_pid IS NOT NULL AND c.claimed_at < k.crashed_at;
                -- the claim of a small batch just sent may be lost too
                PERFORM redrive._suspect(b.batch_id, 1, b.total, NULL, k.crashed_at)
                FROM redrive.batches AS b
                JOIN redrive.handlers AS h ON h.handler_id = b.handler_id AND h.kind <> 'external'
                WHERE b.claimable AND b.claimed_to = 0 AND b.total <= 100 AND b.sealed_at BETWEEN k.crashed_at - interval '1 min' AND k.crashed_at
                  AND b.serve_after <= k.crashed_at; -- by index: this is asked until the next restart
            ELSE
                INSERT INTO redrive.crashes AS x (batch_id, item_no, crash_count, first_crashed_at, last_crashed_at)
                SELECT b.batch_id, k.id, 1, k.crashed_at, k.crashed_at
                FROM redrive.batches AS b
                WHERE b.batch_id = k.batch_id AND k.id BETWEEN 1 AND b.total
                ON CONFLICT ON CONSTRAINT crashes_pkey DO UPDATE
                SET crash_count = greatest(x.crash_count, 1) + 1, last_crashed_at = k.crashed_at
                WHERE x.last_crashed_at < k.crashed_at;
        END CASE;
    END LOOP;
END
$$;
-- Record and finish.  A worker's own statements (fence, counters, failures)
-- are in src/flow/record.c; here is what happens to a batch when one of its
-- chunks has ended.

-- Add the ended chunks of a batch to its counters and, when nothing is left,
-- move it on.  In a transaction of its own after the chunk's commit, so that
-- under READ COMMITTED the last of several workers sees everything; repeated
-- by the stale pass if a crash swallowed it.
CREATE FUNCTION redrive._fold(p_batch_id bigint) RETURNS redrive.batch_state
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches;
    h redrive.handlers;
    s record;
    v_live boolean;
    v_waiting bigint;
    v_next timestamptz;
BEGIN
    SELECT * INTO b FROM redrive.batches WHERE batch_id = p_batch_id FOR UPDATE;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    WITH ended AS (
        UPDATE redrive.chunks
        SET folded = true
        WHERE batch_id = p_batch_id AND NOT folded AND state = 'done'
        RETURNING chunk_id, succeeded, ignored, failed, cancelled, waiting, done - claim_done AS done, finished_at, claimed_at
    ), lists AS (
        DELETE FROM redrive.retry_lists WHERE chunk_id IN (SELECT ended.chunk_id FROM ended)
    )
    SELECT count(*) AS chunks, coalesce(sum(succeeded), 0) AS succeeded, coalesce(sum(ignored), 0) AS ignored,
        coalesce(sum(failed), 0) AS failed, coalesce(sum(cancelled), 0) AS cancelled, coalesce(sum(waiting), 0) AS waiting,
        sum(done) FILTER (WHERE finished_at > claimed_at) / nullif(extract(epoch FROM sum(finished_at - claimed_at)), 0) AS rate
    INTO s FROM ended;
    IF s.chunks > 0 THEN
        UPDATE redrive.batches
        SET succeeded = succeeded + s.succeeded, ignored = ignored + s.ignored, failed = failed + s.failed,
            cancelled = cancelled + s.cancelled, waiting = waiting + s.waiting,
            items_per_second = CASE WHEN s.rate > 0 THEN coalesce((items_per_second + s.rate) / 2, s.rate) ELSE items_per_second END,
            last_progress_at = clock_timestamp()
        WHERE batch_id = p_batch_id
        RETURNING * INTO b;
    END IF;
    IF s.chunks > 0 AND b.waiting > 0 AND b.state IN ('running', 'retrying', 'paused') THEN
        -- A retry that was claimed while a worker had failures not yet committed
        -- did not see them, and took them out of next_retry_at.
        SELECT min(f.next_attempt_at) INTO v_next
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting';
        IF v_next < b.next_retry_at OR (v_next IS NOT NULL AND b.next_retry_at IS NULL) THEN
            UPDATE redrive.batches SET next_retry_at = v_next WHERE batch_id = p_batch_id RETURNING * INTO b;
            PERFORM redrive._wake_supervisor();
        END IF;
    END IF;

    IF b.run_no > 1 AND redrive._judge_canary(b) THEN
        RETURN 'running';
    END IF;
    v_live := b.claimed_to < b.total OR EXISTS (SELECT FROM redrive.chunks WHERE batch_id = p_batch_id AND NOT folded);
    SELECT * INTO h FROM redrive.handlers WHERE handler_id = b.handler_id;
    IF b.state IN ('running', 'retrying') AND (b.waiting > 0 OR v_live) AND b.failed - b.failures_accepted > h.tolerated_failures THEN
        PERFORM redrive._pause(b, format('%s items failed, %s are tolerated', b.failed - b.failures_accepted, h.tolerated_failures));
        RETURN 'paused';
    END IF;
    IF v_live THEN
        RETURN b.state;
    END IF;
    IF b.state = 'cancelled' AND b.finished_at IS NULL THEN
        -- failures that a worker committed after the cancel
        v_waiting := redrive._end_waiting(b, 'cancelled', NULL, NULL);
        UPDATE redrive.batches
        SET finished_at = clock_timestamp(), cancelled = cancelled + v_waiting, waiting = waiting - v_waiting,
            next_retry_at = NULL, oldest_failure_at = NULL
        WHERE batch_id = p_batch_id;
    ELSIF b.state = 'running' AND b.waiting > 0 THEN
        UPDATE redrive.batches
        SET state = 'retrying', attempted_at = clock_timestamp()
        WHERE batch_id = p_batch_id
        RETURNING * INTO b;
    ELSIF b.state IN ('running', 'retrying') AND b.waiting = 0 THEN
        UPDATE redrive.batches
        SET state = 'finished', finished_at = clock_timestamp(), attempted_at = coalesce(attempted_at, clock_timestamp()),
            next_retry_at = NULL, oldest_failure_at = NULL
        WHERE batch_id = p_batch_id
        RETURNING * INTO b;
        IF h.on_finish IS NOT NULL THEN
            INSERT INTO redrive.callbacks (handler_id, batch_id, kind, run_no, next_attempt_at)
            VALUES (b.handler_id, b.batch_id, 'on_finish', b.run_no, clock_timestamp());
            PERFORM redrive._wake(h.owner);
        END IF;
    END IF;
    RETURN b.state;
END
$$;

-- Fold the ended chunks whose worker could not do it, or did it in a commit that
-- a crash swallowed; return how many batches had any.  A batch that somebody has
-- locked is left for the next call: the supervisor must not wait for users.
CREATE FUNCTION redrive._fold_ended() RETURNS bigint
LANGUAGE sql AS $$
    SELECT count(redrive._fold(f.batch_id))
    FROM (SELECT DISTINCT x.batch_id FROM redrive.chunks AS x WHERE NOT x.folded AND x.state = 'done') AS c
    CROSS JOIN LATERAL (SELECT b.batch_id FROM redrive.batches AS b WHERE b.batch_id = c.batch_id FOR UPDATE SKIP LOCKED) AS f
$$;

-- Pause a live batch; the caller holds its row lock or does not care who wins.
CREATE FUNCTION redrive._pause(b redrive.batches, p_reason text) RETURNS void
LANGUAGE sql AS $$
    UPDATE redrive.batches
    SET state = 'paused', pause_reason = p_reason
    WHERE batch_id = b.batch_id AND state IN ('ready', 'running', 'retrying')
$$;

-- Give a claim back.  The chunk of a paused or live batch becomes orphaned, to
-- be taken by the next worker; what is left of a cancelled batch's chunk is
-- counted as cancelled.  p_lost: the worker is gone (counted as a rescue, and
-- against the chunk unless it is known that the chunk is not to blame).
CREATE FUNCTION redrive._give_back(p_chunk_id bigint, p_lease_token bigint, p_lost boolean) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    c redrive.chunks;
    b redrive.batches;
    v_left bigint;
    v_owner oid;
    v_excused boolean;
BEGIN
    -- batch first, then chunk: the order every statement here keeps
    SELECT s.* INTO b FROM redrive.batches AS s JOIN redrive.chunks AS r ON r.batch_id = s.batch_id
    WHERE r.chunk_id = p_chunk_id FOR UPDATE OF s;
    SELECT * INTO c FROM redrive.chunks
    WHERE chunk_id = p_chunk_id AND state = 'running' AND lease_token = p_lease_token FOR UPDATE;
    IF NOT FOUND THEN
        RETURN false;
    END IF;
    SELECT owner INTO v_owner FROM redrive.handlers WHERE handler_id = c.handler_id;
    v_left := c.items - c.done;
    IF b.state = 'cancelled' THEN
        PERFORM redrive._cancel_chunk(b, c);
        PERFORM redrive._fold(c.batch_id);
    ELSIF v_left = 0 THEN
        UPDATE redrive.chunks
        SET state = 'done', lease_token = NULL, worker_pid = NULL, worker_started_at = NULL, lease_until = NULL, finished_at = clock_timestamp()
        WHERE chunk_id = p_chunk_id;
        PERFORM redrive._fold(c.batch_id);
    ELSIF p_lost AND c.lease_until IS NOT NULL AND v_left = 1 AND c.rescue_count + 1 - c.excused >= 10 THEN
        PERFORM redrive._quarantine(b, c, c.rescue_count + 1 - c.excused);
        PERFORM redrive._fold(c.batch_id);
    ELSE
        -- the rate so far decides how much the next worker takes
        UPDATE redrive.batches
        SET items_per_second = greatest(c.done - c.claim_done, 0.1) / greatest(extract(epoch FROM clock_timestamp() - c.claimed_at), 0.001)
        WHERE batch_id = c.batch_id AND NOT p_lost;
        -- another process crashed, or an item that has been counted
        v_excused := p_lost AND EXISTS (
            SELECT FROM redrive._crumbs() AS k
            WHERE k.chunk_id = p_chunk_id AND k.lease_token = p_lease_token AND k.kind IN ('item', 'unlock', 'innocent'));
        UPDATE redrive.chunks
        SET state = 'orphaned', lease_token = NULL, worker_pid = NULL, worker_started_at = NULL, lease_until = NULL,
            rescue_count = rescue_count + p_lost::int, excused = excused + v_excused::int
        WHERE chunk_id = p_chunk_id;
        IF p_lost AND NOT v_excused AND c.rescue_count + 1 - c.excused >= 10 THEN
            PERFORM redrive._pause(b, format('chunk %s lost its worker %s times', c.chunk_id, c.rescue_count + 1 - c.excused));
        END IF;
    END IF;
    PERFORM redrive._wake(v_owner), redrive._notify(c.handler_id);
    RETURN true;
END
$$;

-- What is not done of a chunk; of a retry chunk also numbers that are not in
-- its list.  Only external workers do items out of their order.
CREATE FUNCTION redrive._open_ranges(c redrive.chunks) RETURNS int8multirange
LANGUAGE sql IMMUTABLE AS $$
    SELECT int8multirange(int8range(c.done_to, c.to_no, '(]')) - coalesce(c.settled, '{}')
$$;

-- Cancel what is left of a chunk and unlock its keys; the caller has locked both.
CREATE FUNCTION redrive._cancel_chunk(b redrive.batches, c redrive.chunks) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF c.kind = 'first' THEN
        PERFORM redrive._unlock_range(b, lower(r), upper(r) - 1) FROM unnest(redrive._open_ranges(c)) AS r;
    ELSE
        PERFORM redrive._put_back(b, c);
    END IF;
    UPDATE redrive.chunks
    SET state = 'done', lease_token = NULL, worker_pid = NULL, worker_started_at = NULL, lease_until = NULL, finished_at = clock_timestamp(),
        cancelled = cancelled + items - done, items = done, to_no = CASE WHEN kind = 'first' THEN coalesce(upper(settled) - 1, done_to) ELSE to_no END
    WHERE chunk_id = c.chunk_id;
END
$$;

-- The items of a retry chunk that were not run again become cancelled failures,
-- with the error that is in the log.
CREATE FUNCTION redrive._put_back(b redrive.batches, c redrive.chunks) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_keys text[];
BEGIN
    WITH left_over AS (
        SELECT u.item_no, u.attempts, u.free_count, u.first_failed_at
        FROM redrive.retry_lists AS l
        CROSS JOIN LATERAL unnest(l.item_nos, l.attempts, l.free_counts, l.first_failed_at) AS u (item_no, attempts, free_count, first_failed_at)
        WHERE l.chunk_id = c.chunk_id AND redrive._open_ranges(c) @> u.item_no
    ), unlogged AS (
        DELETE FROM redrive.failure_log AS g
        USING left_over AS u
        WHERE g.part = c.part AND g.batch_id = c.batch_id AND g.item_no = u.item_no AND g.attempt = u.attempts
        RETURNING g.*, u.free_count, u.first_failed_at
    ), cancelled AS (
        INSERT INTO redrive.failures (part, batch_id, item_no, handler_id, run_no, state, error_class, sqlstate, fingerprint, retry_count,
            free_count, attempts, first_failed_at, last_failed_at, key, message, detail, hint, context, constraint_name)
        SELECT g.part, g.batch_id, g.item_no, c.handler_id, g.run_no, 'cancelled', g.error_class, g.sqlstate, g.fingerprint,
            greatest(g.attempt - g.free_count - 1, 0), g.free_count, g.attempt, g.first_failed_at, g.failed_at,
            k.keys[g.item_no - k.first_no + 1], g.message, g.detail, g.hint, g.context, g.constraint_name
        FROM unlogged AS g
        CROSS JOIN LATERAL (
            SELECT x.first_no, x.keys
            FROM redrive.item_blocks AS x
            WHERE x.part = b.part AND x.batch_id = b.batch_id AND x.first_no <= g.item_no
            ORDER BY x.first_no DESC
            LIMIT 1) AS k
        RETURNING key
    )
    SELECT array_agg(x.key) FILTER (WHERE x.key IS NOT NULL) INTO v_keys FROM cancelled AS x;
    PERFORM redrive._unlock_keys(b, v_keys);
END
$$;

-- Unlock the keys of a range of items that became final where no user code may
-- run.
CREATE FUNCTION redrive._unlock_range(b redrive.batches, p_from bigint, p_to bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_keys text[];
BEGIN
    IF NOT b.keyed OR p_from > p_to THEN
        RETURN 0;
    END IF;
    SELECT array_agg(i.key) INTO v_keys
    FROM redrive._items(b.part, b.batch_id, p_from, p_to) AS i
    WHERE i.key IS NOT NULL;
    RETURN redrive._unlock_keys(b, v_keys);
END
$$;

-- Unlock these keys of a batch; on_unlock is left to an executor of the owner.
CREATE FUNCTION redrive._unlock_keys(b redrive.batches, p_keys text[]) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_on_unlock text;
    v_count bigint;
BEGIN
    IF p_keys IS NULL THEN
        RETURN 0;
    END IF;
    SELECT on_unlock INTO v_on_unlock FROM redrive.handlers WHERE handler_id = b.handler_id;
    WITH freed AS (
        -- one probe of the index per key, whatever is known of the table when this is planned
        DELETE FROM redrive.locks
        WHERE ctid = ANY (ARRAY(
            SELECT x.ctid
            FROM unnest(p_keys) AS u (key)
            CROSS JOIN LATERAL (
                SELECT l.ctid FROM redrive.locks AS l
                WHERE l.handler_id = b.handler_id AND l.key = u.key AND l.batch_id = b.batch_id
                OFFSET 0) AS x))
        RETURNING key
    ), later AS (
        INSERT INTO redrive.callbacks (handler_id, batch_id, kind, key, run_no, next_attempt_at)
        SELECT b.handler_id, b.batch_id, 'on_unlock', freed.key, b.run_no, clock_timestamp()
        FROM freed
        WHERE v_on_unlock IS NOT NULL
    )
    SELECT count(*) INTO v_count FROM freed;
    RETURN v_count;
END
$$;
-- Classification: rules are data.

INSERT INTO redrive.classification_rules (priority, sqlstate_pattern, error_class, action, builtin) VALUES
    (0, 'RD001', 'validation', 'ignore', true),
    (0, 'RD002', 'user_error', 'retry', true),
    (0, '40001', 'transient', 'retry_free', true),
    (0, '40P01', 'transient', 'retry_free', true),
    (0, '55P03', 'transient', 'retry_free', true),
    (0, '57014', 'timeout', 'retry', true),
    (0, '23503', 'missing_parent', 'retry', true),
    (0, '0A000', 'defect', 'pause', true),
    (0, '53%', 'infrastructure', 'retry_free', true),
    (0, '57P%', 'infrastructure', 'retry_free', true),
    (0, '58%', 'infrastructure', 'retry_free', true),
    (0, '08%', 'infrastructure', 'retry_free', true),
    (0, '22%', 'data', 'fail', true),
    (0, '23%', 'data', 'fail', true),
    (0, '42%', 'defect', 'pause', true),
    (0, NULL, 'other', 'retry', true);

-- room for builtin rules of later versions
ALTER TABLE redrive.classification_rules ALTER COLUMN rule_id RESTART WITH 1000;

-- The rule for an error, and whether the same rule holds for every message
-- with this SQLSTATE and constraint (then a worker need not ask again).
CREATE FUNCTION redrive._classify(p_handler text, p_sqlstate text, p_message text, p_constraint text)
RETURNS TABLE (rule_id int, error_class text, action redrive.rule_action, for_all_messages boolean)
LANGUAGE sql STABLE AS $$
    WITH fitting AS (
        SELECT r.*
        FROM redrive.classification_rules AS r
        WHERE r.enabled
          AND (r.handler IS NULL OR r.handler = p_handler)
          AND (r.sqlstate_pattern IS NULL OR p_sqlstate LIKE r.sqlstate_pattern)
          AND (r.constraint_name IS NULL OR r.constraint_name = p_constraint)
    )
    SELECT r.rule_id, r.error_class, r.action, NOT EXISTS (SELECT FROM fitting WHERE message_pattern IS NOT NULL)
    FROM fitting AS r
    WHERE r.message_pattern IS NULL OR p_message ~ r.message_pattern
    ORDER BY r.priority DESC, (r.handler IS NOT NULL) DESC, (r.message_pattern IS NOT NULL) DESC, (r.constraint_name IS NOT NULL) DESC,
        length(rtrim(r.sqlstate_pattern, '%')) DESC NULLS LAST, r.rule_id
    LIMIT 1
$$;

-- Rules of a handler are its owner's: they name constraints and messages.
CREATE FUNCTION redrive._classify(p_caller oid, p_handler text, p_sqlstate text, p_message text, p_constraint text,
    OUT error_class text, OUT action redrive.rule_action, OUT rule text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF EXISTS (SELECT FROM redrive.handlers WHERE name = p_handler) THEN
        PERFORM redrive._handler(p_caller, p_handler);
    END IF;
    SELECT c.error_class, c.action,
        concat_ws(', ', 'rule ' || r.rule_id, 'handler ' || r.handler, 'priority ' || nullif(r.priority, 0),
            'sqlstate ' || r.sqlstate_pattern, 'constraint ' || r.constraint_name, 'message ~ ' || quote_literal(r.message_pattern))
    INTO error_class, action, rule
    FROM redrive._classify(p_handler, p_sqlstate, coalesce(p_message, ''), p_constraint) AS c
    JOIN redrive.classification_rules AS r ON r.rule_id = c.rule_id;
END
$$;

CREATE FUNCTION redrive.classify(handler text, sqlstate text, message text DEFAULT '', constraint_name text DEFAULT NULL,
    OUT error_class text, OUT action redrive.rule_action, OUT rule text)
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.classify IS
'Explain what would be done about an error: its class, the action, and the rule that decides. Order of rules: priority, then those for one handler, then with a message pattern, then with a constraint, then the longest SQLSTATE pattern. Errors: 42501 the handler is not yours.';

CREATE FUNCTION redrive.raise_validation(message text, detail text DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_raise_validation';
COMMENT ON FUNCTION redrive.raise_validation IS
'For handlers: raise SQLSTATE RD001, by default classified as validation and ignored.';

CREATE FUNCTION redrive.raise_user_error(message text, detail text DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_raise_user_error';
COMMENT ON FUNCTION redrive.raise_user_error IS
'For handlers: raise SQLSTATE RD002, by default classified as user_error and retried.';
-- External: workers outside of the database, in any language, over the same
-- ledger.  A claim is a chunk with a lease instead of a worker process; the token
-- of the lease is the fence, and all that a worker has to keep.
--
-- Items are settled in any order: those behind done_to are in chunks.settled.  A
-- first chunk moves done_to on when it can, a retry chunk only at its end.

-- Tell those who listen, at commit, that there is something to claim.
CREATE FUNCTION redrive._notify(p_handler_id int) RETURNS void
LANGUAGE sql AS $$
    SELECT pg_notify('redrive_' || h.name, '') FROM redrive.handlers AS h WHERE h.handler_id = $1 AND h.notify
$$;

-- When the next lease ends, in the past too.
CREATE FUNCTION redrive._next_lease() RETURNS timestamptz
LANGUAGE sql STABLE AS $$
    SELECT min(greatest(c.lease_until, (SELECT u.since FROM redrive._up AS u) + c.lease))
    FROM redrive.chunks AS c
    WHERE c.state = 'running' AND c.lease_until IS NOT NULL
$$;

CREATE FUNCTION redrive._check_lease(p_lease interval) RETURNS void
LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    IF p_lease IS NULL THEN
        RAISE EXCEPTION 'lease must not be null' USING ERRCODE = '22004', HINT = 'Leave it out to have 5 minutes.';
    ELSIF p_lease < interval '1 ms' OR p_lease > interval '30 days' THEN
        RAISE EXCEPTION 'lease must be between 1 ms and 30 days' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', p_lease), HINT = 'Take a few minutes, and renew it with redrive.heartbeat().';
    END IF;
END
$$;

-- Several workers that claim of one batch follow one another: wait a moment for
-- its lock, and keep it only if there is still something to claim.
CREATE FUNCTION redrive._lock_soon(p_batch_id bigint) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '1s' AS $$
DECLARE
    b redrive.batches;
BEGIN
    SELECT * INTO b FROM redrive.batches AS x WHERE x.batch_id = p_batch_id FOR UPDATE;
    IF b.claimable OR (b.state IN ('running', 'retrying')
                       AND (b.next_retry_at <= clock_timestamp() OR EXISTS (SELECT FROM redrive.chunks AS c WHERE c.batch_id = p_batch_id AND c.state = 'orphaned'))) THEN
        RETURN true;
    END IF;
    RAISE EXCEPTION 'unlock the batch' USING ERRCODE = 'RD000';
EXCEPTION WHEN lock_not_available OR SQLSTATE 'RD000' THEN
    RETURN false;
END
$$;

-- Take some work of a handler for an external worker: by priority, then what has
-- been due longest; batches that another session has locked are skipped.
--   claimed  c is the claim
--   busy     another session has locked what there is
--   changed  nothing to claim, but something was written down: do not wait now
--   none     nothing to claim
CREATE FUNCTION redrive._take_work(h redrive.handlers, p_max_items bigint, p_lease interval, p_worker text,
    OUT outcome text, OUT c redrive.chunks, OUT more boolean)
LANGUAGE plpgsql AS $$
DECLARE
    v_now timestamptz := clock_timestamp();
    v_work text;
    v_batch_id bigint;
    v_locked bigint; -- the first batch that was skipped
    v_fold boolean;
    v_due bigint[];
    b redrive.batches;
    t record;
    n bigint;
BEGIN
    outcome := 'none';
    FOR v_work, v_batch_id IN
        SELECT w.work, w.batch_id FROM redrive._work(h.handler_id, v_now) AS w
        WHERE w.work <> 'callback'
        ORDER BY w.priority DESC, w.due, w.work = 'orphan' DESC
    LOOP
        IF v_work = 'first' THEN
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = h.handler_id AND s.claimable AND s.serve_after <= (SELECT clock_timestamp())
            ORDER BY s.priority DESC, s.serve_after
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                v_locked := coalesce(v_locked, v_batch_id);
                CONTINUE;
            END IF;
            -- nobody folds after an external worker's commit; not each time, as
            -- it costs as much as the claim, unless it may pause the batch
            SELECT count(*) >= 10 OR coalesce(sum(x.failed), 0) > 0 INTO v_fold
            FROM (
                SELECT y.failed FROM redrive.chunks AS y
                WHERE y.batch_id = b.batch_id AND NOT y.folded AND y.state = 'done'
                LIMIT 10
            ) AS x;
            IF v_fold THEN
                PERFORM redrive._fold(b.batch_id);
                SELECT * INTO b FROM redrive.batches AS s WHERE s.batch_id = b.batch_id;
                IF NOT b.claimable THEN
                    outcome := 'changed';
                    CONTINUE;
                END IF;
            END IF;
            n := least(p_max_items, b.total - b.claimed_to);
            UPDATE redrive.batches AS s
            SET state = 'running', claimed_to = b.claimed_to + n, serve_after = v_now, last_progress_at = v_now,
                started_at = coalesce(s.started_at, v_now)
            WHERE s.batch_id = b.batch_id;
            INSERT INTO redrive.chunks AS x (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,
                lease_token, claimed_at, progress_at, worker, lease, lease_until)
            VALUES (b.batch_id, b.handler_id, b.part, b.run_no, 'first', 'running', b.claimed_to + 1, b.claimed_to + n, b.claimed_to, n,
                nextval('redrive.lease_tokens'), v_now, v_now, p_worker, p_lease, v_now + p_lease)
            RETURNING x.* INTO c;
            outcome := 'claimed';
            more := b.claimed_to + n < b.total;
            RETURN;
        ELSIF v_work = 'retry' THEN
            SELECT * INTO b
            FROM redrive.batches AS s
            WHERE s.handler_id = h.handler_id AND s.next_retry_at <= v_now AND s.state IN ('running', 'retrying')
            ORDER BY s.next_retry_at
            LIMIT 1
            FOR UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                v_locked := coalesce(v_locked, v_batch_id);
                CONTINUE;
            END IF;
            SELECT array_agg(d.item_no ORDER BY d.item_no) INTO v_due
            FROM (
                SELECT f.item_no
                FROM redrive.failures AS f
                WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting' AND f.next_attempt_at <= v_now
                ORDER BY f.next_attempt_at
                LIMIT p_max_items
            ) AS d;
            IF v_due IS NOT NULL THEN
                c := redrive._take_up(b, v_due, NULL, NULL, NULL);
            END IF;
            UPDATE redrive.batches AS s
            SET next_retry_at = (SELECT min(f.next_attempt_at) FROM redrive.failures AS f
                                 WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'),
                last_progress_at = v_now
            WHERE s.batch_id = b.batch_id;
            IF v_due IS NULL THEN
                outcome := 'changed';
                CONTINUE;
            END IF;
        ELSE
            SELECT r.* INTO c
            FROM redrive.chunks AS r
            JOIN redrive.batches AS s ON s.batch_id = r.batch_id
            WHERE r.handler_id = h.handler_id AND r.state = 'orphaned' AND s.state IN ('running', 'retrying')
            ORDER BY s.priority DESC, s.serve_after, r.chunk_id
            LIMIT 1
            FOR UPDATE OF s, r SKIP LOCKED;
            IF NOT FOUND THEN
                v_locked := coalesce(v_locked, v_batch_id);
                CONTINUE;
            END IF;
            UPDATE redrive.batches AS s SET serve_after = v_now WHERE s.batch_id = c.batch_id;
            -- an item that is the end of its worker is soon alone
            n := greatest(least(p_max_items, (c.items - c.done) >> least(c.rescue_count - c.excused, 30)), 1);
            IF n < c.items - c.done THEN
                c := redrive._split(c, n);
            END IF;
        END IF;
        UPDATE redrive.chunks AS x
        SET state = 'running', lease_token = nextval('redrive.lease_tokens'), claim_done = x.done, claimed_at = v_now, progress_at = v_now,
            worker = p_worker, lease = p_lease, lease_until = v_now + p_lease
        WHERE x.chunk_id = c.chunk_id
        RETURNING x.* INTO c;
        outcome := 'claimed';
        more := true;
        RETURN;
    END LOOP;
    IF v_locked IS NOT NULL AND outcome = 'none' THEN
        IF redrive._lock_soon(v_locked) THEN
            SELECT * INTO t FROM redrive._take_work(h, p_max_items, p_lease, p_worker);
            outcome := t.outcome;
            c := t.c;
            more := t.more;
        ELSE
            outcome := 'busy';
        END IF;
    END IF;
END
$$;

-- Split an orphaned chunk that the caller has locked, and return the part that
-- has its next n open items.
CREATE FUNCTION redrive._split(c redrive.chunks, n bigint) RETURNS redrive.chunks
LANGUAGE plpgsql AS $$
DECLARE
    v_cut bigint; -- the last item of that part
    v_tail int8multirange;
    v_done bigint;
BEGIN
    IF c.kind = 'first' THEN
        -- the rest is a new chunk
        SELECT x.item_no INTO STRICT v_cut
        FROM unnest(redrive._open_ranges(c)) AS r
        CROSS JOIN LATERAL generate_series(lower(r), upper(r) - 1) AS x (item_no)
        ORDER BY x.item_no
        OFFSET n - 1
        LIMIT 1;
        v_tail := c.settled * int8multirange(int8range(v_cut, NULL, '()'));
        v_done := coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(v_tail) AS r), 0);
        INSERT INTO redrive.chunks (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items, done,
            rescue_count, excused, claim_done, claimed_at, progress_at, settled)
        VALUES (c.batch_id, c.handler_id, c.part, c.run_no, 'first', 'orphaned', v_cut + 1, c.to_no, v_cut, c.to_no - v_cut, v_done,
            c.rescue_count, c.excused, v_done, c.claimed_at, c.progress_at, CASE WHEN NOT isempty(v_tail) THEN v_tail END);
        UPDATE redrive.chunks AS x
        SET to_no = v_cut, items = x.items - (c.to_no - v_cut), done = x.done - v_done,
            settled = CASE WHEN c.settled - v_tail <> '{}' THEN c.settled - v_tail END
        WHERE x.chunk_id = c.chunk_id
        RETURNING x.* INTO c;
        RETURN c;
    END IF;

    -- the part is a new chunk, lest the long list of a redrive be written each time
    WITH part AS (
        SELECT u.item_no, u.attempts, u.free_count, u.first_failed_at
        FROM redrive.retry_lists AS l
        CROSS JOIN LATERAL unnest(l.item_nos, l.attempts, l.free_counts, l.first_failed_at) AS u (item_no, attempts, free_count, first_failed_at)
        WHERE l.chunk_id = c.chunk_id AND redrive._open_ranges(c) @> u.item_no
        ORDER BY u.item_no
        LIMIT n
    ), chunk AS (
        INSERT INTO redrive.chunks AS x (batch_id, handler_id, part, run_no, kind, state, from_no, to_no, done_to, items,
            rescue_count, excused, claimed_at, progress_at)
        SELECT c.batch_id, c.handler_id, c.part, c.run_no, 'retry', 'orphaned', min(p.item_no), max(p.item_no), min(p.item_no) - 1, n,
            c.rescue_count, c.excused, c.claimed_at, c.progress_at
        FROM part AS p
        RETURNING x.chunk_id, x.to_no
    ), list AS (
        INSERT INTO redrive.retry_lists (chunk_id, item_nos, attempts, free_counts, first_failed_at)
        SELECT (SELECT k.chunk_id FROM chunk AS k), array_agg(p.item_no ORDER BY p.item_no), array_agg(p.attempts ORDER BY p.item_no),
            array_agg(p.free_count ORDER BY p.item_no), array_agg(p.first_failed_at ORDER BY p.item_no)
        FROM part AS p
        RETURNING chunk_id
    ), rest AS (
        UPDATE redrive.chunks AS x
        SET done_to = k.to_no, items = x.items - n,
            settled = CASE WHEN x.settled - int8multirange(int8range(NULL, k.to_no, '(]')) <> '{}'
                           THEN x.settled - int8multirange(int8range(NULL, k.to_no, '(]')) END
        FROM chunk AS k
        WHERE x.chunk_id = c.chunk_id
    )
    SELECT l.chunk_id INTO STRICT v_cut FROM list AS l;
    SELECT x.* INTO STRICT c FROM redrive.chunks AS x WHERE x.chunk_id = v_cut;
    RETURN c;
END
$$;

-- One attempt to claim, for claim(); outcome as in _take_work.
CREATE FUNCTION redrive._claim_external(p_caller oid, p_handler text, p_max_items int, p_lease interval, p_worker text)
RETURNS TABLE (outcome text, owner oid, more boolean, chunk_id bigint, lease_token bigint, lease_until timestamptz, batch_id bigint,
    part smallint, retry boolean, done_to bigint, to_no bigint, settled bigint[])
LANGUAGE plpgsql AS $$
DECLARE
    h redrive.handlers := redrive._handler(p_caller, p_handler);
    t record;
BEGIN
    IF h.kind <> 'external' THEN
        RAISE EXCEPTION 'handler "%" is not external', p_handler USING ERRCODE = '55000',
            DETAIL = format('Its kind is "%s".', h.kind), HINT = 'Its items are done by the workers of the server.';
    ELSIF p_max_items IS NULL OR p_max_items NOT BETWEEN 1 AND 10000 THEN
        RAISE EXCEPTION 'max_items must be between 1 and 10000' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', coalesce(p_max_items::text, 'NULL')), HINT = 'Claim no more than the worker does within its lease.';
    END IF;
    PERFORM redrive._check_lease(p_lease);
    owner := h.owner;
    outcome := 'none';
    IF h.paused THEN
        RETURN NEXT;
        RETURN;
    END IF;
    IF h.max_workers IS NULL THEN
        SELECT * INTO t FROM redrive._take_work(h, p_max_items, p_lease, p_worker);
        outcome := t.outcome;
    ELSE
        BEGIN
            PERFORM FROM redrive.handlers AS x WHERE x.handler_id = h.handler_id FOR NO KEY UPDATE SKIP LOCKED;
            IF NOT FOUND THEN
                outcome := 'busy';
            ELSIF h.max_workers > (SELECT count(*) FROM redrive.chunks AS r WHERE r.handler_id = h.handler_id AND r.state = 'running') THEN
                SELECT * INTO t FROM redrive._take_work(h, p_max_items, p_lease, p_worker);
                outcome := t.outcome;
            END IF;
            IF outcome IN ('busy', 'none') THEN
                RAISE EXCEPTION 'unlock the handler' USING ERRCODE = 'RD000';
            END IF;
        EXCEPTION WHEN SQLSTATE 'RD000' THEN
            NULL; -- whoever waits for work keeps no others from it
        END;
    END IF;
    IF outcome <> 'claimed' AND NOT redrive._preloaded() AND redrive._orphan_lost() + redrive._fold_ended() > 0 THEN
        outcome := 'changed'; -- there is no supervisor to do it
    END IF;
    IF outcome = 'claimed' THEN
        PERFORM redrive._wake_supervisor_by((t.c).lease_until);
        SELECT (t.c).chunk_id, (t.c).lease_token, (t.c).lease_until, (t.c).batch_id, (t.c).part, (t.c).kind = 'retry', (t.c).done_to, (t.c).to_no, t.more
        INTO chunk_id, lease_token, lease_until, batch_id, part, retry, done_to, to_no, more;
        IF (t.c).settled IS NOT NULL THEN
            SELECT array_agg(x.item_no ORDER BY x.item_no) INTO settled
            FROM unnest((t.c).settled) AS r
            CROSS JOIN LATERAL generate_series(lower(r), upper(r) - 1) AS x (item_no);
        END IF;
    END IF;
    RETURN NEXT;
END
$$;

CREATE FUNCTION redrive.claim(handler text, max_items int DEFAULT 100, lease interval DEFAULT '5 min', worker text DEFAULT NULL, wait interval DEFAULT NULL)
RETURNS TABLE (chunk_id bigint, lease_token bigint, batch_id bigint, item_no bigint, key text, payload jsonb, attempt int, lease_until timestamptz)
LANGUAGE c VOLATILE ROWS 100 AS 'MODULE_PATHNAME', 'redrive_claim_external';
COMMENT ON FUNCTION redrive.claim IS
'For external workers: claim up to max_items items of one batch, one chunk of work, until the lease ends. All rows have the same chunk_id and lease_token; no rows when nothing is due. Commit before the work, so that the others see it. wait: if nothing is due, wait for it up to so long, at most 60 s, in one go at READ COMMITTED. Errors: 42704 unknown handler, 42501 not yours, 55000 not external, or wait at another isolation level, 22023 max_items, lease or wait out of range, 22004 lease NULL.';

-- Refuse whoever has not the claim he says, or has it no more.
CREATE FUNCTION redrive._refuse_claim(p_caller oid, p_chunk_id bigint, p_lease_token bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    SELECT x.state, x.lease_until, x.finished_at, x.lease_token INTO c
    FROM redrive.chunks AS x
    JOIN redrive.handlers AS h ON h.handler_id = x.handler_id
    WHERE x.chunk_id = p_chunk_id AND pg_has_role(p_caller, h.owner::oid, 'USAGE');
    RAISE EXCEPTION 'chunk % is not claimed with lease token %', coalesce(p_chunk_id::text, 'NULL'), coalesce(p_lease_token::text, 'NULL') USING ERRCODE = 'RD004',
        DETAIL = CASE
            WHEN c.state IS NULL THEN 'You have no such chunk.'
            WHEN c.state = 'done' THEN format('It ended at %s.', redrive._seconds(c.finished_at))
            WHEN c.state = 'orphaned' THEN 'It was taken back, and waits for another worker.'
            WHEN c.lease_until IS NULL THEN 'A worker of the server has it.'
            ELSE 'Another worker has claimed it.' END,
        HINT = 'Roll back, forget its items, and claim others.';
END
$$;

CREATE FUNCTION redrive._claim_of(p_caller oid, p_chunk_id bigint, p_lease_token bigint) RETURNS redrive.chunks
LANGUAGE plpgsql STABLE AS $$
DECLARE
    c redrive.chunks;
BEGIN
    SELECT x.* INTO c
    FROM redrive.chunks AS x
    WHERE x.chunk_id = p_chunk_id AND x.lease_token = p_lease_token AND x.state = 'running' AND x.lease_until IS NOT NULL;
    IF NOT FOUND THEN
        PERFORM redrive._refuse_claim(p_caller, p_chunk_id, p_lease_token);
    END IF;
    PERFORM redrive._check_member(p_caller, (SELECT h.owner::oid FROM redrive.handlers AS h WHERE h.handler_id = c.handler_id), format('chunk %s', p_chunk_id));
    RETURN c;
END
$$;

CREATE FUNCTION redrive._heartbeat(p_caller oid, p_chunk_id bigint, p_lease_token bigint, p_lease interval) RETURNS timestamptz
LANGUAGE plpgsql AS $$
DECLARE
    c redrive.chunks := redrive._claim_of(p_caller, p_chunk_id, p_lease_token);
    v_lease interval := coalesce(p_lease, c.lease);
    v_until timestamptz;
BEGIN
    PERFORM redrive._check_lease(v_lease);
    IF EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = c.batch_id AND b.state = 'cancelled') THEN
        RETURN NULL;
    END IF;
    UPDATE redrive.chunks AS x
    SET lease = v_lease, lease_until = clock_timestamp() + v_lease
    WHERE x.chunk_id = p_chunk_id AND x.lease_token = p_lease_token AND x.state = 'running'
    RETURNING x.lease_until INTO v_until;
    IF NOT FOUND THEN
        PERFORM redrive._refuse_claim(p_caller, p_chunk_id, p_lease_token);
    END IF;
    PERFORM redrive._wake_supervisor_by(v_until);
    RETURN v_until;
END
$$;

CREATE FUNCTION redrive.heartbeat(chunk_id bigint, lease_token bigint, lease interval DEFAULT NULL) RETURNS timestamptz
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.heartbeat IS
'For external workers: renew the lease of a claim, from now, for as long as it was claimed for or for another time; return when it ends. NULL: the batch was cancelled and the lease stays as it is; settle what is done and release the rest. Errors: RD004 not your claim, or not any more, 42501 not yours, 22023 lease out of range.';

CREATE FUNCTION redrive._release(p_caller oid, p_chunk_id bigint, p_lease_token bigint) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive._claim_of(p_caller, p_chunk_id, p_lease_token);
    IF NOT redrive._give_back(p_chunk_id, p_lease_token, false) THEN
        PERFORM redrive._refuse_claim(p_caller, p_chunk_id, p_lease_token);
    END IF;
END
$$;

CREATE FUNCTION redrive.release(chunk_id bigint, lease_token bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.release IS
'For external workers: give back the items of a claim that are not settled, at no cost, and end it. Errors: RD004 not your claim, or not any more, 42501 not yours.';

-- The items of a claim that are not settled, or those of them that are wanted.
CREATE FUNCTION redrive._open_items(p_chunk_id bigint, p_wanted bigint[])
RETURNS TABLE (item_no bigint, key text, attempts int, free_count int, first_failed_at timestamptz)
LANGUAGE plpgsql STABLE ROWS 100 AS $$
DECLARE
    c redrive.chunks;
    v_keyed boolean;
    v_open int8multirange;
BEGIN
    SELECT x.* INTO STRICT c FROM redrive.chunks AS x WHERE x.chunk_id = p_chunk_id;
    SELECT b.keyed INTO STRICT v_keyed FROM redrive.batches AS b WHERE b.batch_id = c.batch_id;
    v_open := redrive._open_ranges(c);
    RETURN QUERY
    SELECT i.item_no, k.key, i.attempts, i.free_count, i.first_failed_at
    FROM (
        SELECT w.item_no, 0 AS attempts, 0 AS free_count, NULL::timestamptz AS first_failed_at
        FROM unnest(p_wanted) AS w (item_no)
        WHERE c.kind = 'first' AND v_open @> w.item_no
        UNION ALL
        SELECT g.item_no, 0, 0, NULL
        FROM unnest(v_open) AS r
        CROSS JOIN LATERAL generate_series(lower(r), upper(r) - 1) AS g (item_no)
        WHERE c.kind = 'first' AND p_wanted IS NULL
        UNION ALL
        SELECT u.item_no, u.attempts, u.free_count, u.first_failed_at
        FROM redrive.retry_lists AS l
        CROSS JOIN LATERAL unnest(l.item_nos, l.attempts, l.free_counts, l.first_failed_at) AS u (item_no, attempts, free_count, first_failed_at)
        WHERE l.chunk_id = c.chunk_id AND v_open @> u.item_no AND (p_wanted IS NULL OR u.item_no = ANY (p_wanted))
    ) AS i
    LEFT JOIN LATERAL (
        SELECT x.keys[i.item_no - x.first_no + 1] AS key
        FROM redrive.item_blocks AS x
        WHERE x.part = c.part AND x.batch_id = c.batch_id AND x.first_no <= i.item_no
        ORDER BY x.first_no DESC
        LIMIT 1
    ) AS k ON v_keyed
    ORDER BY i.item_no;
END
$$;

-- Unlock the keys of items that an external worker settled; on_unlock, which is
-- the owner's to run, is left to an executor.
CREATE FUNCTION redrive._unlock_settled(p_batch_id bigint, p_keys text[]) RETURNS void
LANGUAGE sql AS $$
    SELECT redrive._unlock_keys(b, $2) FROM redrive.batches AS b WHERE b.batch_id = $1
$$;

-- The last open item of an external claim was lost with its worker too often: it
-- is not tried again.  The caller has locked batch and chunk.
CREATE FUNCTION redrive._quarantine(b redrive.batches, c redrive.chunks, p_times int) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_key text;
BEGIN
    INSERT INTO redrive.failures AS f (part, batch_id, item_no, handler_id, run_no, state, reason, error_class, sqlstate, fingerprint, retry_count,
        free_count, attempts, first_failed_at, last_failed_at, key, message, detail, hint)
    SELECT c.part, c.batch_id, i.item_no, c.handler_id, c.run_no, 'failed', 'quarantined', 'crash', '57P02', left(md5('lost'), 16),
        greatest(i.attempts - i.free_count, 0), i.free_count, i.attempts + 1, coalesce(i.first_failed_at, clock_timestamp()), clock_timestamp(), i.key,
        format('the item was lost with its worker %s times', p_times),
        'The worker died, or settled nothing until its lease ended.',
        'When the worker is mended, run the item again with redrive.redrive().'
    FROM redrive._open_items(c.chunk_id, NULL) AS i
    RETURNING f.key INTO STRICT v_key;
    UPDATE redrive.chunks
    SET state = 'done', lease_token = NULL, lease_until = NULL, finished_at = clock_timestamp(), progress_at = clock_timestamp(),
        done_to = to_no, settled = NULL, done = items, failed = failed + 1, rescue_count = rescue_count + 1
    WHERE chunk_id = c.chunk_id;
    IF v_key IS NOT NULL THEN
        PERFORM redrive._unlock_keys(b, ARRAY[v_key]);
    END IF;
END
$$;

CREATE FUNCTION redrive.settle(chunk_id bigint, lease_token bigint, outcomes redrive.outcome[]) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_settle';
COMMENT ON FUNCTION redrive.settle IS
'For external workers: write down what became of these items of a claim, in any order; the claim goes on. Part of the caller''s transaction: what the worker wrote in it is done exactly once. Errors: RD004 not your claim, or not any more, RD005 an item that is not in the claim, twice or settled already, or a delay out of range, 42501 not yours, 22004 NULL.';

CREATE FUNCTION redrive.complete(chunk_id bigint, lease_token bigint, exceptions redrive.outcome[] DEFAULT '{}') RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_complete';
COMMENT ON FUNCTION redrive.complete IS
'For external workers: all items of a claim that are not settled succeeded, but for the exceptions; end it. Part of the caller''s transaction, as settle(). Errors: those of settle().';
-- Stale: find batches that are stuck, and the passes that put them right.
--
-- redrive._stale says for each live batch from when on which reason holds;
-- stale_batches_at(as_of) is that list at one time, and the passes act on it.
-- No code of users runs in a pass: what has to run is left to workers.

CREATE FUNCTION redrive._preloaded() RETURNS boolean
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__preloaded';

-- Worker slots of this database in shared memory; none without preload.
-- open_*: items done in the commit interval that is not committed yet.
CREATE FUNCTION redrive._slots()
RETURNS TABLE (
    pid int, kind text, owner oid, handler_id int, batch_id bigint, chunk_id bigint, state text,
    open_succeeded bigint, open_failed bigint, item_no bigint, item_started_at timestamptz,
    claimed_at timestamptz, items_per_second float8, started_at timestamptz)
LANGUAGE c STABLE ROWS 10 AS 'MODULE_PATHNAME', 'redrive__slots';

-- Handlers whose rows the current user may see.  "mine": with payloads and
-- messages.  The others are seen by monitors, counts only: a monitor is a role
-- with SELECT on the column redrive.batches.batch_id.
CREATE VIEW redrive._visible WITH (security_barrier) AS
SELECT h.handler_id, h.name, h.kind, h.owner, h.max_retries, h.stale_after, h.start_timeout, h.retry_window, h.max_workers, h.paused,
    pg_has_role(h.owner::oid, 'USAGE') AS mine
FROM redrive.handlers AS h
WHERE pg_has_role(h.owner::oid, 'USAGE')
   OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

-- What the chunks that are not folded yet add to the counters of their batch.
CREATE VIEW redrive._unfolded AS
SELECT c.batch_id,
    sum(c.succeeded)::bigint AS succeeded,
    sum(c.ignored)::bigint AS ignored,
    sum(c.failed)::bigint AS failed,
    sum(c.cancelled)::bigint AS cancelled,
    sum(c.waiting)::bigint AS waiting,
    coalesce(sum(c.items - c.done) FILTER (WHERE c.state = 'running' OR (c.state = 'orphaned' AND c.kind = 'retry')), 0)::bigint AS running,
    coalesce(sum(c.items - c.done) FILTER (WHERE c.state = 'orphaned' AND c.kind = 'first'), 0)::bigint AS pending,
    count(*) FILTER (WHERE c.state = 'running') AS running_chunks,
    count(*) FILTER (WHERE c.state = 'orphaned') AS orphaned_chunks,
    count(*) FILTER (WHERE c.state = 'done') AS done_chunks,
    max(c.progress_at) AS progress_at
FROM redrive.chunks AS c
WHERE NOT c.folded
GROUP BY c.batch_id;

-- Since when this server takes writes: the start of a process that is started
-- only then, after a crash and on a promoted standby too.
CREATE VIEW redrive._up AS
SELECT max(a.backend_start) AS since
FROM pg_stat_get_activity(NULL) AS a
WHERE a.backend_type = 'walwriter';

-- Claims and whether their worker lives.  Facts, not clocks: a process of that
-- pid and start is there or it is not, and it is here: a database restored from
-- a dump next to the original has the claims of workers of that one.  The start of a process of another role
-- is hidden from ordinary users, who then go by the pid.
-- An external worker lives as long as its lease, and while the server was down it
-- could not renew that: then the lease counts from the server's start.  It is
-- stuck when it settles nothing for longer than stale_after and than its lease.
CREATE VIEW redrive._running_chunks AS
SELECT c.chunk_id, c.batch_id, c.lease_token, c.progress_at,
    CASE WHEN c.lease_until IS NULL THEN a.pid IS NOT NULL ELSE l.ends_at > clock_timestamp() END AS alive,
    s.item_no IS NOT NULL AS in_item,
    l.ends_at AS lease_ends_at,
    c.progress_at + greatest(c.lease, h.stale_after) AS stuck_from
FROM redrive.chunks AS c
JOIN redrive.handlers AS h ON h.handler_id = c.handler_id
CROSS JOIN LATERAL (
    SELECT CASE WHEN c.lease_until IS NOT NULL THEN greatest(c.lease_until, (SELECT u.since FROM redrive._up AS u) + c.lease) END AS ends_at
) AS l
LEFT JOIN pg_stat_get_activity(NULL) AS a
    ON a.pid = c.worker_pid AND a.datid = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
    AND (a.backend_start = c.worker_started_at OR a.backend_start IS NULL)
LEFT JOIN redrive._slots() AS s ON s.pid = c.worker_pid AND s.chunk_id = c.chunk_id
WHERE c.state = 'running';

-- Live batches and when each has to be looked at closer.  look_from is not later
-- than the time from which any reason holds, and cheap: it takes no look at
-- failures.
CREATE VIEW redrive._live AS
SELECT l.batch_id, l.part, l.state, l.run_at, l.sealed_at, l.last_progress_at, l.attempted_at, l.next_retry_at,
    v.name AS handler, v.owner, v.kind, v.paused, v.max_retries, v.retry_window, w.lost_since, w.stuck_since, w.stuck_from,
    greatest(l.last_progress_at, u.progress_at) AS progress_at,
    CASE WHEN l.state = 'open' THEN l.last_progress_at + v.start_timeout END AS unsealed_from,
    CASE WHEN l.state = 'ready' THEN greatest(l.run_at, l.sealed_at) + v.start_timeout END AS start_from,
    CASE WHEN l.state IN ('running', 'retrying') AND coalesce(u.running_chunks, 0) = 0 AND (l.claimed_to < l.total OR u.orphaned_chunks > 0)
         THEN greatest(l.last_progress_at, u.progress_at) + v.stale_after END AS idle_from,
    CASE WHEN l.claimed_to = l.total AND coalesce(u.running_chunks + u.orphaned_chunks, 0) = 0
              AND (l.state = 'cancelled'
                   OR (l.state IN ('running', 'retrying')
                       AND (u.done_chunks > 0 OR l.waiting = 0 OR (l.state = 'running' AND l.next_retry_at IS NULL))))
         THEN greatest(l.last_progress_at, u.progress_at) + interval '1 min' END AS unfinished_from,
    CASE WHEN l.state = 'retrying' AND l.next_retry_at IS NULL THEN l.attempted_at END AS failed_from,
    l.state IN ('running', 'retrying') AS may_be_overdue,
    l.oldest_failure_at + v.retry_window AS expired_from,
    least(w.lost_since, w.stuck_from, CASE l.state
        WHEN 'ready' THEN greatest(l.run_at, l.sealed_at) + v.start_timeout
        WHEN 'open' THEN l.last_progress_at + v.start_timeout
        WHEN 'paused' THEN l.oldest_failure_at + v.retry_window
        ELSE least(
            l.next_retry_at + interval '1 min',
            l.oldest_failure_at + v.retry_window,
            CASE WHEN l.claimed_to < l.total OR u.orphaned_chunks > 0 THEN greatest(l.last_progress_at, u.progress_at) + v.stale_after
                 WHEN l.next_retry_at IS NULL OR l.waiting = 0 OR u.done_chunks > 0 THEN l.last_progress_at END,
            CASE WHEN l.next_retry_at IS NULL THEN l.oldest_failure_at END)
    END) AS look_from
FROM (
    SELECT x.batch_id, x.handler_id, x.part, x.state, x.total, x.claimed_to, x.waiting, x.run_at, x.sealed_at,
        x.last_progress_at, x.attempted_at, x.next_retry_at, x.oldest_failure_at
    FROM redrive.batches AS x
    WHERE x.state NOT IN ('finished', 'cancelled')
    UNION ALL
    SELECT x.batch_id, x.handler_id, x.part, x.state, x.total, x.claimed_to, x.waiting, x.run_at, x.sealed_at,
        x.last_progress_at, x.attempted_at, x.next_retry_at, x.oldest_failure_at
    FROM redrive.batches AS x
    WHERE x.state = 'cancelled' AND x.finished_at IS NULL
      AND x.batch_id IN (SELECT c.batch_id FROM redrive.chunks AS c WHERE NOT c.folded)
) AS l
JOIN redrive._visible AS v ON v.handler_id = l.handler_id
LEFT JOIN redrive._unfolded AS u ON u.batch_id = l.batch_id
LEFT JOIN (
    SELECT c.batch_id,
        min(coalesce(c.lease_ends_at, c.progress_at)) FILTER (WHERE NOT c.alive OR c.lease_ends_at IS NOT NULL) AS lost_since,
        min(c.progress_at) FILTER (WHERE c.alive AND NOT c.in_item) AS stuck_since,
        min(c.stuck_from) FILTER (WHERE c.alive AND NOT c.in_item) AS stuck_from
    FROM redrive._running_chunks AS c
    GROUP BY c.batch_id
) AS w ON w.batch_id = l.batch_id;

-- Every reason a live batch may be stale for, with the time from which it
-- holds.  Ask with a condition on look_from as well, so that the closer look is
-- paid for the few candidates only.
CREATE VIEW redrive._stale WITH (security_barrier) AS
SELECT b.batch_id, b.handler, r.reason, r.since, r.action, b.look_from, r.stale_from, r.stale_until
FROM redrive._live AS b
CROSS JOIN LATERAL (
    SELECT CASE
        WHEN b.paused THEN format('none: the handler is paused, see redrive.resume_handler(%L)', b.handler)
        WHEN b.kind = 'external' THEN 'none: no application claims it'
        WHEN NOT (SELECT redrive._preloaded()) THEN 'none: no workers, as pg_redrive is not in shared_preload_libraries; CALL redrive.work()'
        WHEN NOT (SELECT coalesce(current_setting('redrive.enabled', true), 'on')::boolean) THEN 'none: redrive.enabled is off'
        WHEN (SELECT current_setting('redrive.max_workers', true)) = '0' THEN 'none: no workers, as redrive.max_workers is 0; CALL redrive.work()'
        WHEN NOT EXISTS (SELECT FROM pg_roles AS o WHERE o.oid = b.owner::oid AND (o.rolcanlogin OR current_setting('server_version_num')::int >= 170000))
            THEN format('none: role %s may not log in, so it can have no workers; CALL redrive.work()', b.owner)
        ELSE format('wake the workers of %s', b.owner)
    END AS wake
) AS k
CROSS JOIN LATERAL (
    SELECT 'orphaned' AS reason, b.lost_since AS since, 'give the items of its lost worker to another' AS action, b.lost_since AS stale_from, NULL::timestamptz AS stale_until
    UNION ALL
    SELECT 'no_progress', b.stuck_since, 'take the items away from a worker that does nothing', b.stuck_from, NULL
    UNION ALL
    SELECT 'no_progress', b.progress_at, k.wake, b.idle_from, NULL
    UNION ALL
    SELECT 'never_started', greatest(b.run_at, b.sealed_at), k.wake, b.start_from, NULL
    UNION ALL
    SELECT 'unsealed', b.last_progress_at, 'cancel it and unlock its keys', b.unsealed_from, NULL
    UNION ALL
    SELECT 'unfinished', b.progress_at, 'mark its end', b.unfinished_from, NULL
    UNION ALL
    SELECT 'failed_recently', b.attempted_at, 'start a new run', b.failed_from, b.attempted_at + b.retry_window
    WHERE b.failed_from IS NOT NULL
      AND EXISTS (
        SELECT FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting' AND f.next_attempt_at IS NULL AND f.retry_count < b.max_retries)
    UNION ALL
    SELECT 'overdue_retry', d.due, k.wake, d.due + interval '1 min', NULL
    FROM (
        SELECT coalesce(b.next_retry_at, (
            SELECT min(f.next_attempt_at)
            FROM redrive.failures AS f
            WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting')) AS due
        WHERE b.may_be_overdue
        OFFSET 0
    ) AS d
    UNION ALL
    SELECT 'expired', d.first_failed_at, 'fail the items that waited too long and unlock their keys', d.first_failed_at + b.retry_window, NULL
    FROM (
        SELECT min(f.first_failed_at) AS first_failed_at
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'
    ) AS d
    WHERE b.expired_from IS NOT NULL
) AS r;

CREATE FUNCTION redrive.stale_batches_at(as_of timestamptz)
RETURNS TABLE (batch_id bigint, handler text, reason text, since timestamptz, action text)
LANGUAGE sql STABLE AS $$
    SELECT s.batch_id, s.handler, s.reason, s.since, s.action
    FROM redrive._stale AS s
    WHERE s.look_from <= $1 AND s.stale_from <= $1 AND (s.stale_until IS NULL OR s.stale_until >= $1)
$$;
COMMENT ON FUNCTION redrive.stale_batches_at IS
'The list redrive.stale_batches as it is, or will be if nothing moves, at another time: batches that are stuck, why, since when, and what the next pass does about it.';

-- Count the items that crashed the server, then give back the chunks whose
-- worker is gone, or whose lease has ended as of that time.  Called by the
-- supervisor and by the pass rescue_stale; returns how many.  A chunk that fails
-- or whose batch is locked is left for the next call.
CREATE FUNCTION redrive._orphan_lost(p_as_of timestamptz DEFAULT clock_timestamp()) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_chunks bigint[];
    v_tokens bigint[];
BEGIN
    PERFORM redrive._blame();
    PERFORM pg_stat_clear_snapshot();
    SELECT array_agg(c.chunk_id ORDER BY c.chunk_id), array_agg(c.lease_token ORDER BY c.chunk_id) INTO v_chunks, v_tokens
    FROM redrive._running_chunks AS c
    WHERE CASE WHEN c.lease_ends_at IS NULL THEN NOT c.alive ELSE c.lease_ends_at <= p_as_of END;
    RETURN CASE WHEN v_chunks IS NULL THEN 0 ELSE redrive._give_back_lost(v_chunks, v_tokens) END;
END
$$;

-- Give back these claims, in one subtransaction when all goes well; halve the
-- list to find the one that fails.
CREATE FUNCTION redrive._give_back_lost(p_chunks bigint[], p_tokens bigint[]) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    n int := cardinality(p_chunks);
    v_count bigint := 0;
BEGIN
    BEGIN
        FOR i IN 1 .. n LOOP
            -- an external worker may be settling items, in a transaction of its own
            PERFORM FROM redrive.batches AS b
            JOIN redrive.chunks AS c ON c.batch_id = b.batch_id
            WHERE c.chunk_id = p_chunks[i]
            FOR UPDATE SKIP LOCKED;
            IF FOUND AND redrive._give_back(p_chunks[i], p_tokens[i], true) THEN
                v_count := v_count + 1;
            END IF;
        END LOOP;
        RETURN v_count;
    EXCEPTION WHEN OTHERS THEN
        IF n = 1 THEN
            RAISE WARNING 'could not give back chunk %', p_chunks[1] USING DETAIL = SQLERRM;
            RETURN 0;
        END IF;
    END;
    RETURN redrive._give_back_lost(p_chunks[:n / 2], p_tokens[:n / 2])
         + redrive._give_back_lost(p_chunks[n / 2 + 1:], p_tokens[n / 2 + 1:]);
END
$$;

-- What a pass does about one stale batch; returns the number of rows changed.
-- The batch is locked, then the detector is asked again: nobody can move the
-- batch any more.  A batch that somebody else has locked is left alone.
CREATE FUNCTION redrive._put_right(p_reason text, p_batch_id bigint, p_as_of timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches;
    h redrive.handlers;
    c record;
    -- an as_of in the future must not make anything due in the future
    v_due timestamptz := least(p_as_of, clock_timestamp());
    v_count bigint := 0;
BEGIN
    SELECT * INTO b FROM redrive.batches WHERE batch_id = p_batch_id FOR UPDATE SKIP LOCKED;
    IF NOT FOUND OR NOT EXISTS (
        SELECT FROM redrive.stale_batches_at(p_as_of) AS s WHERE s.batch_id = p_batch_id AND s.reason = p_reason) THEN
        RETURN 0;
    END IF;
    SELECT * INTO h FROM redrive.handlers WHERE handler_id = b.handler_id;

    CASE p_reason
        WHEN 'no_progress' THEN
            FOR c IN
                SELECT r.chunk_id, r.lease_token
                FROM redrive._running_chunks AS r
                WHERE r.batch_id = p_batch_id AND r.alive AND NOT r.in_item AND r.stuck_from <= p_as_of
            LOOP
                PERFORM FROM redrive.chunks AS x WHERE x.chunk_id = c.chunk_id FOR UPDATE SKIP LOCKED;
                CONTINUE WHEN NOT FOUND;
                v_count := v_count + redrive._give_back(c.chunk_id, c.lease_token, true)::int;
            END LOOP;
        WHEN 'unsealed' THEN
            PERFORM redrive._cancel(b);
            PERFORM redrive._wake(h.owner);
            v_count := 1;
        WHEN 'unfinished' THEN
            PERFORM redrive._fold(p_batch_id);
            v_count := 1;
        WHEN 'failed_recently' THEN
            UPDATE redrive.failures
            SET next_attempt_at = v_due
            WHERE part = b.part AND batch_id = b.batch_id AND state = 'waiting' AND next_attempt_at IS NULL AND retry_count < h.max_retries;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            UPDATE redrive.batches
            SET state = 'running', run_no = run_no + 1, attempted_at = NULL, next_retry_at = v_due, last_progress_at = clock_timestamp()
            WHERE batch_id = p_batch_id;
            PERFORM redrive._wake(h.owner), redrive._notify(h.handler_id);
        WHEN 'overdue_retry' THEN
            UPDATE redrive.batches
            SET next_retry_at = (
                SELECT min(f.next_attempt_at)
                FROM redrive.failures AS f
                WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting')
            WHERE batch_id = p_batch_id AND next_retry_at IS NULL;
            GET DIAGNOSTICS v_count = ROW_COUNT;
            PERFORM redrive._wake(h.owner) WHERE v_count > 0;
        WHEN 'expired' THEN
            v_count := redrive._end_waiting(b, 'failed', 'expired', p_as_of - h.retry_window);
            UPDATE redrive.batches
            SET failed = failed + v_count, waiting = waiting - v_count,
                next_retry_at = (
                    SELECT min(f.next_attempt_at)
                    FROM redrive.failures AS f
                    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'),
                oldest_failure_at = (
                    SELECT min(f.first_failed_at)
                    FROM redrive.failures AS f
                    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting')
            WHERE batch_id = p_batch_id;
            PERFORM redrive._fold(p_batch_id);
            PERFORM redrive._wake(h.owner);
        ELSE
            NULL;
    END CASE;
    RETURN v_count;
END
$$;

-- The same for several batches, in one subtransaction when all goes well; an
-- error costs the batch that has it and no other.
CREATE FUNCTION redrive._put_right_all(p_reason text, p_batch_ids bigint[], p_as_of timestamptz, OUT acted bigint, OUT errors bigint)
LANGUAGE plpgsql AS $$
DECLARE
    n int := cardinality(p_batch_ids);
    v_part record;
    v_batch_id bigint;
BEGIN
    acted := 0;
    errors := 0;
    BEGIN
        FOREACH v_batch_id IN ARRAY p_batch_ids LOOP
            acted := acted + redrive._put_right(p_reason, v_batch_id, p_as_of);
        END LOOP;
        RETURN;
    EXCEPTION WHEN OTHERS THEN
        acted := 0;
        IF n = 1 THEN
            RAISE WARNING 'could not put right batch %, which is stale: "%"', v_batch_id, p_reason USING DETAIL = SQLERRM;
            errors := 1;
            RETURN;
        END IF;
    END;
    FOR v_part IN
        SELECT x.acted, x.errors FROM redrive._put_right_all(p_reason, p_batch_ids[:n / 2], p_as_of) AS x
        UNION ALL
        SELECT x.acted, x.errors FROM redrive._put_right_all(p_reason, p_batch_ids[n / 2 + 1:], p_as_of) AS x
    LOOP
        acted := acted + v_part.acted;
        errors := errors + v_part.errors;
    END LOOP;
END
$$;

-- Act on all batches that are stale for one of these reasons, until p_limit
-- rows are changed or the time is up; detail says what was done for which.
CREATE FUNCTION redrive._act(p_reasons text[], p_as_of timestamptz, p_limit bigint, p_deadline timestamptz,
    OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    s record;
    v_done record;
    v_acted bigint;
    v_errors bigint := 0;
    v_notes text[] := '{}';
    v_woken bigint := 0;
BEGIN
    acted := 0;
    more := false;
    -- most often there is nothing, and planning the detector takes longer than this
    IF NOT EXISTS (SELECT FROM redrive._live AS l WHERE l.look_from <= p_as_of) THEN
        RETURN;
    END IF;
    FOR s IN
        SELECT x.reason, array_agg(x.batch_id ORDER BY x.since) AS batch_ids,
            array_agg(DISTINCT x.handler) FILTER (WHERE x.action LIKE 'wake %') AS handlers,
            count(*) FILTER (WHERE x.action LIKE 'wake %') AS woken
        FROM redrive.stale_batches_at(p_as_of) AS x
        WHERE x.reason = ANY (p_reasons)
        GROUP BY x.reason
        ORDER BY array_position(p_reasons, x.reason)
    LOOP
        PERFORM redrive._wake(o.owner)
        FROM (SELECT DISTINCT h.owner::oid AS owner FROM redrive.handlers AS h WHERE h.name = ANY (s.handlers)) AS o;
        v_woken := v_woken + s.woken;
        CONTINUE WHEN s.reason = 'never_started';
        v_acted := 0;
        FOR i IN 1 .. cardinality(s.batch_ids) BY 100 LOOP
            IF acted >= p_limit OR clock_timestamp() > p_deadline THEN
                more := true;
                EXIT;
            END IF;
            SELECT x.acted, x.errors INTO v_done FROM redrive._put_right_all(s.reason, s.batch_ids[i:i + 99], p_as_of) AS x;
            acted := acted + v_done.acted;
            v_acted := v_acted + v_done.acted;
            v_errors := v_errors + v_done.errors;
        END LOOP;
        IF v_acted > 0 THEN
            v_notes := v_notes || format('%s %s', s.reason, v_acted);
        END IF;
    END LOOP;
    IF v_woken > 0 THEN
        v_notes := v_notes || format('woken for %s batches', v_woken);
    END IF;
    IF v_errors > 0 THEN
        v_notes := v_notes || format('errors %s', v_errors);
    END IF;
    detail := nullif(array_to_string(v_notes, ', '), '');
END
$$;

CREATE FUNCTION redrive._rescue_stale(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    v_lost bigint := redrive._orphan_lost(p_as_of);
BEGIN
    SELECT x.acted, x.more, x.detail INTO acted, more, detail
    FROM redrive._act(ARRAY['no_progress', 'unfinished', 'unsealed', 'never_started'], p_as_of, 1000, p_deadline) AS x;
    IF v_lost > 0 THEN
        acted := acted + v_lost;
        detail := concat_ws(', ', format('orphaned %s', v_lost), detail);
    END IF;
END
$$;

CREATE FUNCTION redrive._retry_failed(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE sql AS $$
    -- expired first: what has waited too long is not run again
    SELECT x.acted, x.more, x.detail
    FROM redrive._act(ARRAY['expired', 'failed_recently', 'overdue_retry'], $1, 100000, $2) AS x
$$;

-- Old parts.  New batches go to the current part; retention / (parts - 2)
-- later to the next one.  When all batches of a part ended longer than the
-- retention ago, their rows go, some per call, and then the part is truncated.
CREATE FUNCTION redrive._purge(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    c_limit constant bigint := 20000;
    r redrive.rotation;
    v_before timestamptz;
    v_count bigint;
    v_next int;
    v_notes text[] := '{}';
BEGIN
    SELECT * INTO STRICT r FROM redrive.rotation;
    v_before := p_as_of - r.retention;
    acted := 0;
    more := false;

    FOR p IN 0 .. r.parts - 1 LOOP
        CONTINUE WHEN p = r.part OR redrive._part_state(p, v_before) = 'kept';
        IF acted >= c_limit OR clock_timestamp() > p_deadline THEN
            more := true;
            EXIT;
        END IF;
        v_count := redrive._purge_batches(p, v_before, c_limit - acted);
        acted := acted + v_count;
        IF v_count > 0 THEN
            v_notes := v_notes || format('part %s: %s batches', p, v_count);
        END IF;
        CASE redrive._part_state(p, v_before)
            WHEN 'empty' THEN
                IF redrive._truncate_part(p) THEN
                    v_notes := v_notes || format('part %s truncated', p);
                    acted := acted + 1;
                ELSIF redrive._part_bytes(p) > 0 THEN
                    v_notes := v_notes || format('part %s skipped: in use', p);
                END IF;
            WHEN 'old' THEN
                IF v_count > 0 THEN
                    more := true;
                ELSE
                    v_notes := v_notes || format('part %s skipped: in use', p);
                END IF;
            ELSE
                NULL;
        END CASE;
    END LOOP;

    -- rotated_at may lie ahead after a test with another as_of
    IF r.rotated_at < p_as_of - r.retention / (r.parts - 2) OR r.rotated_at > p_as_of THEN
        v_next := (r.part + 1) % r.parts;
        IF redrive._part_state(v_next, v_before) = 'empty' AND redrive._part_bytes(v_next) = 0 THEN
            UPDATE redrive.rotation SET part = v_next, rotated_at = p_as_of;
            acted := acted + 1;
            v_notes := v_notes || format('now part %s', v_next);
        ELSIF r.rotated_at < p_as_of - r.retention THEN
            v_notes := v_notes || format('part %s is still needed: part %s takes new batches on', v_next, r.part);
        END IF;
    END IF;

    v_count := redrive._purge_tasks(v_before, c_limit);
    acted := acted + v_count;
    more := more OR v_count = c_limit;
    IF v_count > 0 THEN
        v_notes := v_notes || format('%s tasks', v_count);
    END IF;

    DELETE FROM redrive.http_log WHERE requested_at < v_before;
    DELETE FROM redrive.pass_log WHERE started_at < v_before;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    acted := acted + v_count;
    IF v_count > 0 THEN
        v_notes := v_notes || format('%s rows of the pass history', v_count);
    END IF;
    detail := nullif(array_to_string(v_notes, ', '), '');
END
$$;

-- empty = no batch, old = all batches ended before p_before, kept = neither.
CREATE FUNCTION redrive._part_state(p_part int, p_before timestamptz) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.part = $1) THEN 'empty'
        WHEN EXISTS (SELECT FROM redrive.batches AS b WHERE b.part = $1 AND b.finished_at IS NULL)
          OR EXISTS (SELECT FROM redrive.batches AS b WHERE b.part = $1 AND b.finished_at >= $2) THEN 'kept'
        ELSE 'old'
    END
$$;

CREATE FUNCTION redrive._part_bytes(p_part int) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT sum(pg_relation_size(('redrive.' || t || '_' || $1)::regclass))::bigint
    FROM unnest(ARRAY['item_blocks', 'failures', 'failure_log', 'push_log']) AS t
$$;

-- Delete up to p_limit ended batches of an old part, with their chunks, crashes
-- and whatever is left of their locks and callbacks.  Rows in use are left.
CREATE FUNCTION redrive._purge_batches(p_part int, p_before timestamptz, p_limit bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_batch_ids bigint[];
BEGIN
    SELECT array_agg(x.batch_id) INTO v_batch_ids
    FROM (
        SELECT b.batch_id
        FROM redrive.batches AS b
        WHERE b.part = p_part AND b.finished_at < p_before AND b.state IN ('finished', 'cancelled')
          AND NOT EXISTS (SELECT FROM redrive.chunks AS c WHERE c.batch_id = b.batch_id AND c.state = 'running')
        ORDER BY b.finished_at
        LIMIT p_limit
        FOR UPDATE OF b SKIP LOCKED
    ) AS x;
    IF v_batch_ids IS NULL THEN
        RETURN 0;
    END IF;
    -- one that is running code of users is left to its worker
    DELETE FROM redrive.callbacks AS k
    USING (SELECT x.callback_id FROM redrive.callbacks AS x WHERE x.batch_id = ANY (v_batch_ids) FOR UPDATE SKIP LOCKED) AS f
    WHERE k.callback_id = f.callback_id;
    DELETE FROM redrive.crashes AS x USING unnest(v_batch_ids) AS i WHERE x.batch_id = i;
    DELETE FROM redrive.locks AS l USING unnest(v_batch_ids) AS i WHERE l.batch_id = i;
    DELETE FROM redrive.canaries AS c USING unnest(v_batch_ids) AS i WHERE c.batch_id = i;
    DELETE FROM redrive.chunks AS c USING unnest(v_batch_ids) AS i WHERE c.batch_id = i;
    DELETE FROM redrive.batches AS b USING unnest(v_batch_ids) AS i WHERE b.batch_id = i;
    RETURN cardinality(v_batch_ids);
END
$$;

-- Truncate the partitions of a part without batches.  False when there is
-- nothing to do, or somebody uses them: a submitter whose batch cannot be seen
-- yet holds a lock, and the look at batches comes after ours.
CREATE FUNCTION redrive._truncate_part(p_part int) RETURNS boolean
LANGUAGE plpgsql SET lock_timeout = '300ms' AS $$
DECLARE
    v_tables text := format('redrive.item_blocks_%1$s, redrive.failures_%1$s, redrive.failure_log_%1$s, redrive.push_log_%1$s', p_part);
BEGIN
    IF redrive._part_bytes(p_part) = 0 THEN
        RETURN false;
    END IF;
    EXECUTE 'LOCK TABLE ' || v_tables || ' IN ACCESS EXCLUSIVE MODE';
    IF EXISTS (SELECT FROM redrive.batches AS b WHERE b.part = p_part) THEN
        RETURN false;
    END IF;
    EXECUTE 'TRUNCATE ' || v_tables;
    RETURN true;
EXCEPTION WHEN lock_not_available OR deadlock_detected THEN
    RETURN false;
END
$$;

CREATE FUNCTION redrive.set_retention(retention interval) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF retention IS NULL THEN
        RAISE EXCEPTION 'retention must not be null' USING ERRCODE = '22004', HINT = 'Give an interval, for example ''30 days''.';
    END IF;
    IF retention <= interval '0' THEN
        RAISE EXCEPTION 'retention must be positive' USING ERRCODE = '22023',
            DETAIL = format('It is "%s".', retention), HINT = 'Give an interval, for example ''30 days''.';
    END IF;
    UPDATE redrive.rotation AS r SET retention = set_retention.retention;
END
$$;
COMMENT ON FUNCTION redrive.set_retention IS
'Set how long ended batches are kept before the pass purge removes them; live ones always stay. What is older goes in portions of a sixth of this time. Errors: 22004 NULL, 22023 not positive.';

-- Lock a pass to the end of the transaction; false when another session has it.
-- Like an advisory lock, but out of reach of pg_advisory_lock(): no user can
-- keep the passes from running.
CREATE FUNCTION redrive._lock_pass(pass text) RETURNS boolean
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'redrive__lock_pass';

-- What all passes share: the switch, the lock, the time budget, the history.
CREATE FUNCTION redrive._pass(p_pass text, p_as_of timestamptz) RETURNS redrive.pass_result
LANGUAGE plpgsql AS $$
DECLARE
    r redrive.pass_result;
    v_started_at timestamptz := clock_timestamp();
    v_deadline timestamptz;
BEGIN
    IF p_as_of IS NULL THEN
        RAISE EXCEPTION 'as_of must not be null' USING ERRCODE = '22004', HINT = 'Leave the argument out to mean now.';
    END IF;
    r.pass := p_pass;
    r.outcome := 'done';
    r.acted := 0;
    r.more := false;
    -- a first call into the library defines the settings
    PERFORM redrive._preloaded();
    v_deadline := v_started_at + coalesce(current_setting('redrive.pass_time_budget', true), '20s')::interval;
    IF NOT coalesce(current_setting('redrive.enabled', true), 'on')::boolean THEN
        r.outcome := 'disabled';
        r.detail := 'redrive.enabled is off';
    ELSIF NOT redrive._lock_pass(p_pass) THEN
        r.outcome := 'already running';
        r.detail := 'already running';
    ELSIF p_pass = 'rescue_stale' THEN
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._rescue_stale(p_as_of, v_deadline) AS x;
    ELSIF p_pass = 'retry_failed' THEN
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._retry_failed(p_as_of, v_deadline) AS x;
    ELSIF p_pass = 'push_tasks' THEN
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._push_tasks(p_as_of, v_deadline) AS x;
    ELSE
        SELECT x.acted, x.more, x.detail INTO r.acted, r.more, r.detail FROM redrive._purge(p_as_of, v_deadline) AS x;
    END IF;
    INSERT INTO redrive.pass_log (pass, as_of, started_at, finished_at, acted, more, detail)
    VALUES (p_pass, p_as_of, v_started_at, clock_timestamp(), r.acted, r.more, r.detail);
    RETURN r;
END
$$;

CREATE FUNCTION redrive.rescue_stale(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN redrive._pass('rescue_stale', as_of);
END
$$;
COMMENT ON FUNCTION redrive.rescue_stale IS
'Pass: put right the batches of redrive.stale_batches that lost their worker, do not move, were never sealed or not marked as finished, and wake workers for those that did not start. Returns one row, which is also kept in redrive.pass_history; more = call again. As of another time for tests.';

CREATE FUNCTION redrive.retry_failed(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN redrive._pass('retry_failed', as_of);
END
$$;
COMMENT ON FUNCTION redrive.retry_failed IS
'Pass: start a new run of batches whose failed items wait for this pass (handlers without retry_delay), wake workers for retries that are overdue, and end items that waited longer than retry_window as failed, reason expired. Returns one row, which is also kept in redrive.pass_history; more = call again.';

CREATE FUNCTION redrive.purge(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN redrive._pass('purge', as_of);
END
$$;
COMMENT ON FUNCTION redrive.purge IS
'Pass: remove what ended longer ago than the retention (redrive.set_retention()), part by part; live batches stay. A part in use is skipped until the next time. Returns one row, which is also kept in redrive.pass_history; more = call again.';

CREATE PROCEDURE redrive.run_pass(pass text, as_of timestamptz DEFAULT NULL)
LANGUAGE plpgsql AS $$
DECLARE
    r redrive.pass_result;
    v_deadline timestamptz;
BEGIN
    IF pass IS NULL OR pass NOT IN ('rescue_stale', 'retry_failed', 'push_tasks', 'purge') THEN
        RAISE EXCEPTION 'unknown pass "%"', coalesce(pass, 'NULL') USING ERRCODE = '22023',
            HINT = 'Valid passes are: rescue_stale, retry_failed, push_tasks, purge.';
    END IF;
    LOOP
        CASE pass
            WHEN 'rescue_stale' THEN r := redrive.rescue_stale(coalesce(as_of, clock_timestamp()));
            WHEN 'retry_failed' THEN r := redrive.retry_failed(coalesce(as_of, clock_timestamp()));
            WHEN 'push_tasks' THEN r := redrive.push_tasks(coalesce(as_of, clock_timestamp()));
            ELSE r := redrive.purge(coalesce(as_of, clock_timestamp()));
        END CASE;
        v_deadline := coalesce(v_deadline, clock_timestamp() + coalesce(current_setting('redrive.pass_time_budget', true), '20s')::interval);
        EXIT WHEN NOT r.more OR clock_timestamp() > v_deadline;
        COMMIT;
    END LOOP;
END
$$;
COMMENT ON PROCEDURE redrive.run_pass IS
'Run a pass (rescue_stale, retry_failed, push_tasks or purge) again and again, each time in a transaction of its own, until nothing is left or redrive.pass_time_budget is used up. This is what pg_cron calls; see redrive.schedule_passes(). Errors: 22023 unknown pass.';
-- Platforms: create, alter, drop, pause, resume, and their secrets.

CREATE TYPE redrive.task AS (task_key text, status text, version bigint, process text, payload jsonb, created_at timestamptz, changed_at timestamptz);
COMMENT ON TYPE redrive.task IS 'One task as a build function sees it';

CREATE FUNCTION redrive._check_url(url text, allow_http boolean) RETURNS void
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'redrive__check_url';

CREATE FUNCTION redrive._check_headers(headers jsonb) RETURNS void
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'redrive__check_headers';

-- Have the pusher look, or be started, at commit.
CREATE FUNCTION redrive._wake_pusher() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive__wake_pusher';

-- Have an executor of this role look, or be started, at commit: bodies may be
-- due to be built.
CREATE FUNCTION redrive._wake_builder(p_owner oid) RETURNS void
LANGUAGE sql AS $$
    SELECT redrive._wake(p_owner) WHERE EXISTS (SELECT FROM redrive.platforms AS p WHERE p.owner = p_owner AND p.build IS NOT NULL)
$$;

CREATE FUNCTION redrive._platform(p_caller oid, p_name text) RETURNS redrive.platforms
LANGUAGE plpgsql STABLE AS $$
DECLARE
    p redrive.platforms;
BEGIN
    IF p_name IS NULL THEN
        RAISE EXCEPTION 'platform name must not be null' USING ERRCODE = '22004',
            HINT = 'Give the name of a platform made with redrive.create_platform().';
    END IF;
    SELECT * INTO p FROM redrive.platforms WHERE name = p_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'platform "%" does not exist', p_name USING ERRCODE = '42704',
            HINT = 'Create it with redrive.create_platform(), or look at redrive.platform_health for the names there are.';
    END IF;
    PERFORM redrive._check_member(p_caller, p.owner, format('platform "%s"', p_name));
    RETURN p;
END
$$;

-- What a constraint cannot check.  Ranges of private addresses are opened by
-- those only who answer for the whole server.
CREATE FUNCTION redrive._check_platform(p_caller oid, p_url text, p_allow_http boolean, p_headers jsonb, p_allow_cidr cidr[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive._check_url(p_url, p_allow_http);
    PERFORM redrive._check_headers(p_headers);
    IF p_allow_cidr <> '{}' AND NOT pg_has_role(p_caller, (SELECT nspowner FROM pg_namespace WHERE nspname = 'redrive'), 'USAGE') THEN
        RAISE EXCEPTION 'permission denied to set "allow_cidr"' USING ERRCODE = '42501',
            DETAIL = 'It lets the server send requests into private networks.',
            HINT = 'Ask a superuser to run redrive.alter_platform(..., allow_cidr => ...).';
    END IF;
END
$$;

CREATE FUNCTION redrive._bad_platform(p_constraint text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_column text := substring(p_constraint FROM '^platforms_(.*)_check$');
BEGIN
    RAISE EXCEPTION 'invalid value for "%"', v_column USING ERRCODE = '22023',
        DETAIL = format('The rule is %s.', (SELECT substring(pg_get_constraintdef(oid, true) FROM 'CHECK \((.*)\)')
            FROM pg_constraint WHERE conrelid = 'redrive.platforms'::regclass AND conname = p_constraint)),
        HINT = 'See redrive.create_platform() for units and defaults.';
END
$$;

CREATE FUNCTION redrive._create_platform(
    p_caller oid, p_name text, p_url text, p_max_retries int, p_retry_interval interval, p_retry_factor float8,
    p_method text, p_headers jsonb, p_build text, p_success_when jsonpath,
    p_permanent_status int[], p_push_window interval, p_timeout interval, p_connect_timeout interval,
    p_max_in_flight int, p_rate_limit float8, p_allow_http boolean, p_allow_cidr cidr[],
    p_retry_delay_max interval, p_lease interval) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_id int;
    v_constraint text;
    v_column text;
BEGIN
    IF EXISTS (SELECT FROM redrive.platforms WHERE name = p_name) THEN
        RAISE EXCEPTION 'platform "%" already exists', p_name USING ERRCODE = '42710',
            HINT = 'Change it with redrive.alter_platform(), or choose another name.';
    END IF;
    PERFORM redrive._check_method(p_method);
    PERFORM redrive._check_platform(p_caller, p_url, p_allow_http, p_headers, p_allow_cidr);
    INSERT INTO redrive.platforms (name, owner, url, method, headers, build, success_when, max_retries, retry_interval, retry_factor, retry_delay_max,
        permanent_status, push_window, timeout, connect_timeout, lease, max_in_flight, rate_limit, allow_http, allow_cidr)
    VALUES (p_name, p_caller, p_url, upper(p_method)::redrive.http_method, p_headers, p_build, p_success_when, p_max_retries, p_retry_interval, p_retry_factor, p_retry_delay_max,
        p_permanent_status, p_push_window, p_timeout, p_connect_timeout, p_lease, p_max_in_flight, p_rate_limit, p_allow_http, p_allow_cidr)
    RETURNING platform_id INTO v_id;
    INSERT INTO redrive.platform_states (platform_id) VALUES (v_id);
    PERFORM redrive._plan_platform(v_id, now());
    PERFORM redrive._wake_pusher(), redrive._wake_builder(p_caller);
EXCEPTION
    WHEN check_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        PERFORM redrive._bad_platform(v_constraint);
    WHEN not_null_violation THEN
        GET STACKED DIAGNOSTICS v_column = COLUMN_NAME;
        RAISE EXCEPTION '% must not be null', v_column USING ERRCODE = '22004',
            HINT = 'Leave the argument out to get its default.';
END
$$;

CREATE FUNCTION redrive._check_method(p_method text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF upper(p_method) <> ALL (enum_range(NULL::redrive.http_method)::text[]) THEN
        RAISE EXCEPTION 'invalid value for "method"' USING ERRCODE = '22023', DETAIL = format('It is "%s".', left(p_method, 20)),
            HINT = format('Valid methods are: %s.', array_to_string(enum_range(NULL::redrive.http_method), ', '));
    END IF;
END
$$;

CREATE FUNCTION redrive._alter_platform(
    p_caller oid, p_name text, p_url text, p_max_retries int, p_retry_interval interval, p_retry_factor float8,
    p_method text, p_headers jsonb, p_build text, p_success_when jsonpath,
    p_permanent_status int[], p_push_window interval, p_timeout interval, p_connect_timeout interval,
    p_max_in_flight int, p_rate_limit float8, p_allow_http boolean, p_allow_cidr cidr[],
    p_retry_delay_max interval, p_lease interval, p_unset text[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    p redrive.platforms := redrive._platform(p_caller, p_name);
    v_unset text[] := coalesce(p_unset, '{}');
    v_wrong text;
    v_constraint text;
BEGIN
    SELECT u INTO v_wrong FROM unnest(v_unset) AS u WHERE u IS NULL OR u NOT IN ('build', 'success_when', 'rate_limit') LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'cannot unset "%"', coalesce(v_wrong, 'NULL') USING ERRCODE = '22023', HINT = 'These can be unset: build, success_when, rate_limit.';
    END IF;
    PERFORM redrive._check_method(p_method);
    PERFORM redrive._check_platform(p_caller, coalesce(p_url, p.url), coalesce(p_allow_http, p.allow_http), coalesce(p_headers, p.headers), p_allow_cidr);
    IF p_build IS NOT NULL OR 'build' = ANY (v_unset) THEN
        -- waits for those who plan by the old function
        PERFORM FROM redrive.platforms WHERE platform_id = p.platform_id FOR UPDATE;
        UPDATE redrive.pushes SET awaits_build = 'build' <> ALL (v_unset) WHERE platform_id = p.platform_id AND state <> 'delivered';
        DELETE FROM redrive.push_bodies AS b USING redrive.pushes AS u WHERE u.push_id = b.push_id AND u.platform_id = p.platform_id;
    END IF;
    UPDATE redrive.platforms SET
        url = coalesce(p_url, url),
        max_retries = coalesce(p_max_retries, max_retries),
        retry_interval = coalesce(p_retry_interval, retry_interval),
        retry_factor = coalesce(p_retry_factor, retry_factor),
        retry_delay_max = coalesce(p_retry_delay_max, retry_delay_max),
        method = coalesce(upper(p_method)::redrive.http_method, method),
        headers = coalesce(p_headers, headers),
        build = CASE WHEN 'build' = ANY (v_unset) THEN NULL ELSE coalesce(p_build, build) END,
        success_when = CASE WHEN 'success_when' = ANY (v_unset) THEN NULL ELSE coalesce(p_success_when, success_when) END,
        permanent_status = coalesce(p_permanent_status, permanent_status),
        needs_plan = needs_plan OR coalesce(p_push_window > push_window, false),
        push_window = coalesce(p_push_window, push_window),
        timeout = coalesce(p_timeout, timeout),
        connect_timeout = coalesce(p_connect_timeout, connect_timeout),
        lease = coalesce(p_lease, lease),
        max_in_flight = coalesce(p_max_in_flight, max_in_flight),
        rate_limit = CASE WHEN 'rate_limit' = ANY (v_unset) THEN NULL ELSE coalesce(p_rate_limit, rate_limit) END,
        allow_http = coalesce(p_allow_http, allow_http),
        allow_cidr = coalesce(p_allow_cidr, allow_cidr)
    WHERE platform_id = p.platform_id;
    PERFORM redrive._rearm(p.platform_id);
EXCEPTION WHEN check_violation THEN
    GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
    PERFORM redrive._bad_platform(v_constraint);
END
$$;

-- After a change: what was blocked by the configuration may go now, and the
-- breaker has no reason to stay open.
CREATE FUNCTION redrive._rearm(p_platform_id int) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    UPDATE redrive.pushes AS u SET state = 'pending', next_attempt_at = now()
    FROM redrive.tasks AS t
    WHERE u.platform_id = p_platform_id AND u.state = 'blocked' AND t.task_id = u.task_id AND NOT t.is_test;
    -- the pusher reads the platform again
    UPDATE redrive.platforms SET config_version = config_version + 1 WHERE platform_id = p_platform_id;
    UPDATE redrive.platform_states SET breaker = 'closed', reason = NULL, opened_at = NULL, blocked_until = NULL, times_opened = 0,
        failures_in_row = 0, successes_in_row = 0, window_attempts = 0, window_failures = 0
    WHERE platform_id = p_platform_id;
    PERFORM redrive._wake_pusher(), redrive._wake_builder(p.owner) FROM redrive.platforms AS p WHERE p.platform_id = p_platform_id;
END
$$;

-- Attempts stay in the log until they are purged.
CREATE FUNCTION redrive._drop_platform(p_caller oid, p_name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    p redrive.platforms := redrive._platform(p_caller, p_name);
BEGIN
    PERFORM FROM redrive.platforms WHERE platform_id = p.platform_id FOR UPDATE;
    DELETE FROM redrive.pushes WHERE platform_id = p.platform_id;
    DELETE FROM redrive.platforms WHERE platform_id = p.platform_id;
    PERFORM redrive._wake_pusher();
END
$$;

CREATE FUNCTION redrive._pause_platform(p_caller oid, p_name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    p redrive.platforms := redrive._platform(p_caller, p_name);
BEGIN
    UPDATE redrive.platforms SET paused = true WHERE platform_id = p.platform_id;
END
$$;

CREATE FUNCTION redrive._resume_platform(p_caller oid, p_name text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    p redrive.platforms := redrive._platform(p_caller, p_name);
BEGIN
    UPDATE redrive.platforms SET paused = false WHERE platform_id = p.platform_id;
    PERFORM redrive._rearm(p.platform_id);
END
$$;

CREATE FUNCTION redrive._set_platform_secret(p_caller oid, p_name text, p_kind text, p_secret text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    p redrive.platforms := redrive._platform(p_caller, p_name);
    v_kind redrive.secret_kind;
    v_wrong text;
BEGIN
    IF p_kind IS NULL OR p_kind <> ALL (enum_range(NULL::redrive.secret_kind)::text[]) THEN
        RAISE EXCEPTION 'invalid value for "kind"' USING ERRCODE = '22023', HINT = format('Valid kinds are: %s.', array_to_string(enum_range(NULL::redrive.secret_kind), ', '));
    END IF;
    v_kind := p_kind::redrive.secret_kind;
    -- never shown: not even in an error
    v_wrong := CASE
        WHEN p_secret IS NULL THEN NULL
        WHEN p_secret ~ '[^ -~]' OR p_secret = '' THEN 'It is empty, or has a character that is not ASCII.'
        WHEN length(p_secret) > 2000 THEN 'It is longer than 2000 characters.'
        WHEN v_kind IN ('signing', 'signing_previous') AND p_secret LIKE 'whsec\_%'
            AND (substr(p_secret, 7) !~ '^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$'
                OR length(decode(substr(p_secret, 7), 'base64')) NOT BETWEEN 24 AND 64) THEN 'After "whsec_" there have to be 24 to 64 bytes in base64.'
        WHEN v_kind IN ('signing', 'signing_previous') AND length(p_secret) < 24 THEN 'It is shorter than 24 characters.'
        WHEN v_kind = 'basic' AND p_secret NOT LIKE '%_:%' THEN 'It is not a user name, a colon and a password.'
    END;
    IF v_wrong IS NOT NULL THEN
        RAISE EXCEPTION 'invalid secret of kind "%"', p_kind USING ERRCODE = '22023', DETAIL = v_wrong,
            HINT = 'See redrive.set_platform_secret() for the kinds. A signing key can be made with: openssl rand -base64 32.';
    END IF;
    IF p_secret IS NULL THEN
        DELETE FROM redrive.platform_secrets WHERE platform_id = p.platform_id AND kind = v_kind;
    ELSE
        IF v_kind = 'signing' THEN
            INSERT INTO redrive.platform_secrets (platform_id, kind, secret, set_at)
            SELECT s.platform_id, 'signing_previous', s.secret, s.set_at
            FROM redrive.platform_secrets AS s
            WHERE s.platform_id = p.platform_id AND s.kind = 'signing' AND s.secret <> p_secret
            ON CONFLICT (platform_id, kind) DO UPDATE SET secret = excluded.secret, set_at = excluded.set_at;
        END IF;
        INSERT INTO redrive.platform_secrets (platform_id, kind, secret) VALUES (p.platform_id, v_kind, p_secret)
        ON CONFLICT (platform_id, kind) DO UPDATE SET secret = excluded.secret, set_at = now();
    END IF;
    UPDATE redrive.platforms SET secrets = (
            SELECT coalesce(array_agg(s.kind ORDER BY s.kind), '{}') FROM redrive.platform_secrets AS s WHERE s.platform_id = p.platform_id)
    WHERE platform_id = p.platform_id;
    PERFORM redrive._rearm(p.platform_id);
END
$$;

CREATE FUNCTION redrive.create_platform(
    name text, url text, max_retries int DEFAULT 3, retry_interval interval DEFAULT '5 min', retry_factor float8 DEFAULT 1,
    method text DEFAULT 'POST', headers jsonb DEFAULT '{}', build text DEFAULT NULL, success_when jsonpath DEFAULT NULL,
    permanent_status int[] DEFAULT '{}', push_window interval DEFAULT '3 days', timeout interval DEFAULT '15 s', connect_timeout interval DEFAULT '3 s',
    max_in_flight int DEFAULT 16, rate_limit float8 DEFAULT NULL, allow_http boolean DEFAULT false, allow_cidr cidr[] DEFAULT '{}',
    retry_delay_max interval DEFAULT '1 h', lease interval DEFAULT '1 min') RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_create_platform';
COMMENT ON FUNCTION redrive.create_platform IS
'Create a platform owned by the caller: the tasks of this role are pushed there. max_retries 3 means 4 attempts, retry_interval apart, times retry_factor each time up to retry_delay_max. build: a function of (redrive.task) that returns the body as jsonb, run as the owner in a worker of its own, once per version of a task; NULL = the body is the task. success_when: a path that must be true of the answer, for platforms that answer 200 to what they reject. permanent_status: not retried. Tasks that changed longer than push_window ago are left alone. max_in_flight: requests at once; rate_limit: requests per second, NULL = any. lease: after which a push of which nothing is known is tried again, at least timeout + 30 s. allow_http: not only https; allow_cidr: private ranges that may be reached, set by superusers only. Errors: 42710 name taken, 22023 invalid value, 22004 NULL, 42883 no such function, 42501 no permission.';

CREATE FUNCTION redrive.alter_platform(
    name text, url text DEFAULT NULL, max_retries int DEFAULT NULL, retry_interval interval DEFAULT NULL, retry_factor float8 DEFAULT NULL,
    method text DEFAULT NULL, headers jsonb DEFAULT NULL, build text DEFAULT NULL, success_when jsonpath DEFAULT NULL,
    permanent_status int[] DEFAULT NULL, push_window interval DEFAULT NULL, timeout interval DEFAULT NULL, connect_timeout interval DEFAULT NULL,
    max_in_flight int DEFAULT NULL, rate_limit float8 DEFAULT NULL, allow_http boolean DEFAULT NULL, allow_cidr cidr[] DEFAULT NULL,
    retry_delay_max interval DEFAULT NULL, lease interval DEFAULT NULL, unset text[] DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_alter_platform';
COMMENT ON FUNCTION redrive.alter_platform IS
'Change a platform. NULL leaves a setting unchanged; unset lists settings to make NULL: build, success_when, rate_limit. Takes effect with the next request; pushes that were blocked by the configuration are tried again, and the breaker is closed; with build, bodies are made anew. Errors: 42704 unknown, 42501 not yours, 22023 invalid value, 42883 no such function.';

CREATE FUNCTION redrive.drop_platform(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.drop_platform IS
'Drop a platform, with its secrets and the state of its pushes. What is being sent at the moment may still arrive. Errors: 42704 unknown, 42501 not yours.';

CREATE FUNCTION redrive.pause_platform(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.pause_platform IS
'Send nothing more to this platform; its pushes wait and use up no retries. Errors: 42704 unknown, 42501 not yours.';

CREATE FUNCTION redrive.resume_platform(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.resume_platform IS
'Undo pause_platform, close the breaker of the platform, and try again what was blocked. Errors: 42704 unknown, 42501 not yours.';

CREATE FUNCTION redrive.set_platform_secret(name text, kind text, secret text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_set_platform_secret';
COMMENT ON FUNCTION redrive.set_platform_secret IS
'Set a secret of a platform, which nobody can read back; NULL removes it. Kinds: signing = key of the header webhook-signature (24 bytes or more; or whsec_ and base64), the one before stays valid as signing_previous until it is removed; bearer = token for the header Authorization; basic = user:password for it. Secrets are not in dumps. Errors: 42704 unknown platform, 42501 not yours, 22023 invalid.';
-- Tasks: recorded by applications, or by a trigger on a table of theirs.

-- Let pushes follow the tasks with these numbers: a row for each platform of
-- the owner, and with a new version a new budget.  A push that is under way
-- stays so; its record sees that more is wanted.  Returns the number of rows
-- changed.
CREATE FUNCTION redrive._plan_tasks(p_task_ids bigint[], p_platform_id int DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_count bigint;
BEGIN
    INSERT INTO redrive.pushes AS u (task_id, platform_id, wanted_version, wanted_status, awaits_build)
    SELECT t.task_id, p.platform_id, t.version, t.status, p.build IS NOT NULL
    FROM unnest(p_task_ids) AS n (task_id)
    CROSS JOIN LATERAL (SELECT x.task_id, x.owner, x.version, x.status FROM redrive.tasks AS x WHERE x.task_id = n.task_id AND NOT x.is_test OFFSET 0) AS t
    JOIN redrive.platforms AS p ON p.owner = t.owner AND p.platform_id = coalesce(p_platform_id, p.platform_id)
    ORDER BY t.task_id, p.platform_id
    ON CONFLICT (task_id, platform_id) DO UPDATE SET
        wanted_version = excluded.wanted_version,
        wanted_status = excluded.wanted_status,
        awaits_build = excluded.awaits_build,
        state = CASE WHEN u.state = 'in_flight' THEN u.state ELSE 'pending' END,
        retry_count = 0,
        free_count = 0,
        next_attempt_at = CASE WHEN u.state = 'in_flight' THEN u.next_attempt_at ELSE now() END
    WHERE u.wanted_version < excluded.wanted_version OR u.state = 'blocked';
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END
$$;

-- Record tasks of one owner: arrays of the same length, each key once.
CREATE FUNCTION redrive._record_tasks(p_owner oid, p_keys text[], p_statuses text[], p_payloads jsonb[], p_processes text[], p_tests boolean[]) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_ids bigint[];
    v_tests bigint[];
    v_version bigint;
BEGIN
    PERFORM redrive._check_task(n.key, n.status, n.process)
    FROM unnest(p_keys, p_statuses, p_processes) AS n (key, status, process)
    WHERE n.key = '' OR greatest(length(n.key), length(n.status), length(n.process)) > 1000;
    WITH recorded AS (
        INSERT INTO redrive.tasks AS t (owner, task_key, process, status, payload, is_test)
        SELECT p_owner, n.key, n.process, n.status, n.payload, n.is_test
        FROM unnest(p_keys, p_statuses, p_payloads, p_processes, p_tests) AS n (key, status, payload, process, is_test)
        ORDER BY n.key
        ON CONFLICT (owner, task_key) DO UPDATE SET
            status = excluded.status,
            payload = excluded.payload,
            process = coalesce(excluded.process, t.process),
            is_test = excluded.is_test,
            version = t.version + CASE WHEN t.status <> excluded.status THEN 1 ELSE 0 END,
            changed_at = CASE WHEN t.status <> excluded.status OR t.is_test <> excluded.is_test THEN now() ELSE t.changed_at END
        RETURNING t.task_id, t.version, t.is_test)
    SELECT array_agg(r.task_id ORDER BY r.task_id) FILTER (WHERE NOT r.is_test), array_agg(r.task_id ORDER BY r.task_id) FILTER (WHERE r.is_test), max(r.version)
    INTO v_ids, v_tests, v_version
    FROM recorded AS r;
    IF v_tests IS NOT NULL THEN
        -- one that has become a test
        UPDATE redrive.pushes AS u SET state = 'blocked', error_class = 'test', message = 'The task is a test.'
        FROM unnest(v_tests) AS n (task_id)
        WHERE u.task_id = n.task_id AND u.state IN ('pending', 'waiting');
    END IF;
    IF v_ids IS NOT NULL AND redrive._plan_tasks(v_ids) > 0 THEN
        PERFORM redrive._wake_pusher(), redrive._wake_builder(p_owner);
    END IF;
    RETURN v_version;
END
$$;

CREATE FUNCTION redrive._record_task(p_caller oid, p_task_key text, p_status text, p_payload jsonb, p_process text, p_is_test boolean) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_null text := CASE WHEN p_task_key IS NULL THEN 'task_key' WHEN p_status IS NULL THEN 'status' WHEN p_payload IS NULL THEN 'payload' WHEN p_is_test IS NULL THEN 'is_test' END;
BEGIN
    IF v_null IS NOT NULL THEN
        RAISE EXCEPTION '% must not be null', v_null USING ERRCODE = '22004', HINT = 'Give the key of the task and its status; the other arguments can be left out.';
    END IF;
    RETURN redrive._record_tasks(p_caller, ARRAY[p_task_key], ARRAY[p_status], ARRAY[p_payload], ARRAY[p_process], ARRAY[p_is_test]);
END
$$;

CREATE FUNCTION redrive._check_task(p_task_key text, p_status text, p_process text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF p_task_key = '' OR length(p_task_key) > 1000 THEN
        RAISE EXCEPTION 'invalid value for "task_key"' USING ERRCODE = '22023', DETAIL = format('It has %s characters.', length(p_task_key)), HINT = 'Keys have 1 to 1000 characters.';
    ELSIF length(p_status) > 1000 THEN
        RAISE EXCEPTION 'invalid value for "status"' USING ERRCODE = '22023', DETAIL = format('It has %s characters.', length(p_status)), HINT = 'A status has at most 1000 characters; put the rest into the payload.';
    ELSIF length(p_process) > 1000 THEN
        RAISE EXCEPTION 'invalid value for "process"' USING ERRCODE = '22023', DETAIL = format('It has %s characters.', length(p_process)), HINT = 'A process has at most 1000 characters.';
    END IF;
END
$$;

CREATE FUNCTION redrive.record_task(task_key text, status text, payload jsonb DEFAULT '{}', process text DEFAULT NULL, is_test boolean DEFAULT false) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.record_task IS
'Record the status of a task of the caller, and have it pushed to the caller''s platforms after the commit. Returns the version of the task, which a change of the status raises; with the same status only the payload is replaced. Tests are recorded and not pushed. Errors: 22004 NULL, 22023 too long.';

-- The trigger: in C, so that the rows are read with the rights of who changes
-- the table, and recorded with ours for its owner.
CREATE FUNCTION redrive._task_source() RETURNS trigger
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive__task_source';

CREATE FUNCTION redrive.attach_task_source(relation regclass, key_column name, status_column name, test_column name DEFAULT NULL, payload_columns name[] DEFAULT NULL) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_kind "char";
    v_owner oid;
    v_missing name;
    v_arguments text;
BEGIN
    IF relation IS NULL OR key_column IS NULL OR status_column IS NULL THEN
        RAISE EXCEPTION 'relation, key_column and status_column must not be null' USING ERRCODE = '22004', HINT = 'Name a table, and the columns with the key and the status of each task.';
    END IF;
    SELECT c.relkind, c.relowner INTO v_kind, v_owner FROM pg_class AS c WHERE c.oid = relation;
    IF v_kind IS NULL OR v_kind NOT IN ('r', 'p') OR EXISTS (SELECT FROM pg_inherits AS i WHERE i.inhrelid = relation) THEN
        RAISE EXCEPTION '% cannot be a source of tasks', relation USING ERRCODE = '42809',
            DETAIL = 'It is not a table, or a part of another one.', HINT = 'Attach the table itself, of partitions the parent.';
    ELSIF NOT pg_has_role(v_owner, 'USAGE') THEN
        RAISE EXCEPTION 'permission denied for table %', relation USING ERRCODE = '42501',
            DETAIL = 'It belongs to another role, and so will the tasks.', HINT = 'Ask the owner of the table to attach it.';
    END IF;
    SELECT n.name INTO v_missing
    FROM unnest(ARRAY[key_column, status_column, test_column] || payload_columns) AS n (name)
    WHERE n.name IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attname = n.name AND a.attnum > 0 AND NOT a.attisdropped)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'column "%" of % does not exist', v_missing, relation USING ERRCODE = '42703', HINT = 'Name columns of the table.';
    ELSIF test_column IS NOT NULL AND (SELECT a.atttypid FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attname = test_column) <> 'boolean'::regtype THEN
        RAISE EXCEPTION 'column "%" of % is not boolean', test_column, relation USING ERRCODE = '42804', HINT = 'The test column says true for tests.';
    ELSIF EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = relation AND g.tgname = 'redrive_task_source_insert') THEN
        RAISE EXCEPTION '% is attached already', relation USING ERRCODE = '42710', HINT = 'Run redrive.detach_task_source() first.';
    END IF;
    SELECT string_agg(quote_literal(coalesce(n.name, '')), ', ' ORDER BY n.place) INTO v_arguments
    FROM unnest(ARRAY[key_column, status_column, test_column] || payload_columns) WITH ORDINALITY AS n (name, place);
    EXECUTE format('CREATE TRIGGER redrive_task_source_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS redrive_rows FOR EACH STATEMENT EXECUTE FUNCTION redrive._task_source(%s)', relation, v_arguments);
    EXECUTE format('CREATE TRIGGER redrive_task_source_update AFTER UPDATE ON %s REFERENCING NEW TABLE AS redrive_rows FOR EACH STATEMENT EXECUTE FUNCTION redrive._task_source(%s)', relation, v_arguments);
END
$$;
COMMENT ON FUNCTION redrive.attach_task_source IS
'Record a task for each row of a table that is inserted or updated from now on, as a task of the table''s owner: key and status are texts of these columns, the payload an object of payload_columns (NULL = all). Rows without key or status are left out; test_column says which are tests. Deleted rows leave their tasks as they are. Errors: 42501 not your table, 42809 not a table, 42703 no such column, 42804 test_column not boolean, 42710 attached already.';

CREATE FUNCTION redrive.detach_task_source(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = relation AND g.tgname = 'redrive_task_source_insert') THEN
        RAISE EXCEPTION '% is not attached', coalesce(relation::text, 'NULL') USING ERRCODE = '42704', HINT = 'Nothing has to be done.';
    END IF;
    EXECUTE format('DROP TRIGGER redrive_task_source_insert ON %s', relation);
    EXECUTE format('DROP TRIGGER redrive_task_source_update ON %s', relation);
END
$$;
COMMENT ON FUNCTION redrive.detach_task_source IS
'Undo attach_task_source(); the tasks stay. Errors: 42704 not attached, 42501 not your table.';
-- Push: what the statements of the pusher (flow/push.c) and the pass share.

-- Time from an attempt to the next; n counts retries from 0.
CREATE FUNCTION redrive._retry_delay(base interval, factor float8, most interval, n int, seed bigint) RETURNS interval
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'redrive__retry_delay';

-- End attempts of which nobody will tell any more: their lease is over, or
-- with p_pusher given the pusher that held it is another one, which is dead.
-- The request may have arrived, so it is charged.  Returns how many.
CREATE FUNCTION redrive._reap_pushes(p_as_of timestamptz, p_pusher bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_count bigint;
BEGIN
    WITH lost AS (
        SELECT u.push_id
        FROM redrive.pushes AS u
        WHERE u.state = 'in_flight' AND (u.lease_until <= p_as_of OR u.lease_owner <> p_pusher)
        ORDER BY u.push_id
        LIMIT 10000
        FOR UPDATE SKIP LOCKED),
    ended AS (
        UPDATE redrive.pushes AS u SET
            state = CASE WHEN u.wanted_version > u.sent_version OR u.is_probe THEN 'pending'
                         WHEN u.retry_count >= p.max_retries THEN 'dead'
                         ELSE 'waiting' END::redrive.push_state,
            retry_count = CASE WHEN u.wanted_version > u.sent_version OR u.is_probe OR u.retry_count >= p.max_retries THEN u.retry_count ELSE u.retry_count + 1 END,
            next_attempt_at = CASE WHEN u.wanted_version > u.sent_version OR u.is_probe THEN p_as_of
                                   ELSE p_as_of + redrive._retry_delay(p.retry_interval, p.retry_factor, p.retry_delay_max, u.retry_count, u.push_id) END,
            failed_at = p_as_of, http_status = NULL, error_class = 'unknown', message = 'Nothing is known of the last attempt: the pusher ended or lost its lease.',
            lease_until = NULL, lease_owner = NULL
        FROM lost AS l, redrive.platforms AS p
        WHERE u.push_id = l.push_id AND p.platform_id = u.platform_id
        RETURNING u.push_id, u.attempt_no, u.platform_id, u.sent_version, u.is_probe, p.lease)
    INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe, error_class, message)
    SELECT (SELECT r.part FROM redrive.rotation AS r), e.push_id, e.attempt_no, e.platform_id, e.sent_version, p_as_of, p_as_of, false, NOT e.is_probe, e.is_probe,
        'unknown', 'Nothing is known of the attempt: the pusher ended or lost its lease.'
    FROM ended AS e;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END
$$;

CREATE FUNCTION redrive._redrive_push(p_caller oid, p_platform text, p_task_key text) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_platform_id int;
    v_count bigint;
BEGIN
    IF p_platform IS NOT NULL THEN
        SELECT p.platform_id INTO v_platform_id FROM redrive._platform(p_caller, p_platform) AS p;
    END IF;
    UPDATE redrive.pushes AS u SET state = 'pending', retry_count = 0, free_count = 0, next_attempt_at = now()
    FROM redrive.platforms AS p, redrive.tasks AS t
    WHERE p.platform_id = u.platform_id AND t.task_id = u.task_id AND NOT t.is_test
      AND u.state IN ('dead', 'waiting', 'blocked')
      AND p.platform_id = coalesce(v_platform_id, p.platform_id)
      AND (p_task_key IS NULL OR t.task_key = p_task_key)
      AND pg_has_role(p_caller, p.owner, 'USAGE');
    GET DIAGNOSTICS v_count = ROW_COUNT;
    IF v_count > 0 THEN
        PERFORM redrive._wake_pusher(), redrive._wake_supervisor();
    END IF;
    RETURN v_count;
END
$$;

CREATE FUNCTION redrive.redrive_push(platform text DEFAULT NULL, task_key text DEFAULT NULL) RETURNS bigint
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.redrive_push IS
'Try again at once, with a new budget, pushes that are dead, blocked or wait for a retry: of one platform or all of the caller''s, of one task or all. Returns how many. Errors: 42704 unknown platform, 42501 not yours.';
-- Plan: the pass push_tasks, the net under what record_task() does at once.

-- Let a platform have what it has not: the tasks of its owner that changed
-- within its window, in portions.  Returns how many.
CREATE FUNCTION redrive._plan_platform(p_platform_id int, p_as_of timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    c_portion constant int := 50000;
    v_ids bigint[];
    v_count bigint;
BEGIN
    SELECT array_agg(x.task_id) INTO v_ids
    FROM (
        SELECT t.task_id
        FROM redrive.platforms AS p
        JOIN redrive.tasks AS t ON t.owner = p.owner AND NOT t.is_test AND t.changed_at >= p_as_of - p.push_window
        WHERE p.platform_id = p_platform_id
          AND NOT EXISTS (SELECT FROM redrive.pushes AS u WHERE u.task_id = t.task_id AND u.platform_id = p.platform_id)
        LIMIT c_portion) AS x;
    v_count := CASE WHEN v_ids IS NULL THEN 0 ELSE redrive._plan_tasks(v_ids, p_platform_id) END;
    UPDATE redrive.platforms SET needs_plan = coalesce(cardinality(v_ids), 0) = c_portion WHERE platform_id = p_platform_id;
    RETURN v_count;
END
$$;

CREATE FUNCTION redrive._push_tasks(p_as_of timestamptz, p_deadline timestamptz, OUT acted bigint, OUT more boolean, OUT detail text)
LANGUAGE plpgsql AS $$
DECLARE
    c_portion constant int := 50000;
    v_platform record;
    v_planned bigint := 0;
    v_reaped bigint;
    v_expired bigint;
    v_due boolean;
BEGIN
    more := false;
    FOR v_platform IN SELECT p.platform_id FROM redrive.platforms AS p WHERE p.needs_plan ORDER BY p.platform_id LOOP
        v_planned := v_planned + redrive._plan_platform(v_platform.platform_id, p_as_of);
        EXIT WHEN clock_timestamp() > p_deadline;
    END LOOP;
    more := EXISTS (SELECT FROM redrive.platforms AS p WHERE p.needs_plan);
    v_reaped := redrive._reap_pushes(p_as_of, NULL);
    -- older than the window: nothing waits for ever
    WITH old AS (
        SELECT u.push_id
        FROM redrive.platforms AS p
        CROSS JOIN LATERAL (
            SELECT x.push_id, x.task_id FROM redrive.pushes AS x
            WHERE x.platform_id = p.platform_id AND x.state IN ('pending', 'waiting')) AS u
        JOIN redrive.tasks AS t ON t.task_id = u.task_id
        WHERE t.changed_at < p_as_of - p.push_window
        LIMIT c_portion)
    UPDATE redrive.pushes AS u SET state = 'dead', error_class = 'expired', message = 'The task changed longer ago than push_window.'
    FROM old AS o
    WHERE u.push_id = o.push_id AND u.state IN ('pending', 'waiting');
    GET DIAGNOSTICS v_expired = ROW_COUNT;
    SELECT EXISTS (
        SELECT FROM redrive.platforms AS p
        WHERE EXISTS (SELECT FROM redrive.pushes AS u WHERE u.platform_id = p.platform_id AND u.state IN ('pending', 'waiting') AND u.next_attempt_at <= p_as_of))
    INTO v_due;
    IF v_due THEN
        PERFORM redrive._wake_pusher(), redrive._wake_supervisor();
    END IF;
    acted := v_planned + v_reaped + v_expired;
    more := more OR v_reaped = 10000 OR v_expired = c_portion;
    detail := concat_ws(', ', CASE WHEN v_planned > 0 THEN v_planned || ' planned' END, CASE WHEN v_reaped > 0 THEN v_reaped || ' leases ended' END,
        CASE WHEN v_expired > 0 THEN v_expired || ' expired' END);
    detail := nullif(detail, '');
END
$$;

-- Delete tasks that did not change since then and that nothing is to be pushed
-- of, with their pushes.  Returns how many.
CREATE FUNCTION redrive._purge_tasks(p_before timestamptz, p_limit bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_ids bigint[];
BEGIN
    SELECT array_agg(x.task_id) INTO v_ids
    FROM (
        SELECT t.task_id
        FROM redrive.tasks AS t
        WHERE t.changed_at < p_before
          AND NOT EXISTS (SELECT FROM redrive.pushes AS u WHERE u.task_id = t.task_id AND u.state IN ('pending', 'in_flight', 'waiting'))
        LIMIT p_limit
        FOR UPDATE SKIP LOCKED) AS x;
    IF v_ids IS NULL THEN
        RETURN 0;
    END IF;
    DELETE FROM redrive.pushes AS u USING unnest(v_ids) AS i WHERE u.task_id = i;
    DELETE FROM redrive.tasks AS t USING unnest(v_ids) AS i WHERE t.task_id = i;
    RETURN cardinality(v_ids);
END
$$;

CREATE FUNCTION redrive.push_tasks(as_of timestamptz DEFAULT now()) RETURNS redrive.pass_result
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN redrive._pass('push_tasks', as_of);
END
$$;
COMMENT ON FUNCTION redrive.push_tasks IS
'Pass: plan pushes that are missing (a new platform, a larger push_window), end attempts whose lease is over, give up what is older than push_window, and wake the pusher when something is due. Returns one row, which is also kept in redrive.pass_history; more = call again.';
-- HTTP from SQL: a request that is tried a bounded number of times.

CREATE TYPE redrive.http_result AS (ok boolean, status int, body text, attempts int, error text);
COMMENT ON TYPE redrive.http_result IS 'What came of http_request(): ok = the answer was 2xx; status and body of the last answer, NULL = none; error in words';

CREATE FUNCTION redrive.http_request(
    method text, url text, body text DEFAULT NULL, headers jsonb DEFAULT '{}', max_attempts int DEFAULT 3, timeout interval DEFAULT '5 s',
    retry_delay interval DEFAULT '1 s') RETURNS redrive.http_result
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_http_request';
COMMENT ON FUNCTION redrive.http_request IS
'Send a request, at most max_attempts times retry_delay apart (or as long as the answer asks, up to 60 s), and return what came of it; it never raises for what the network does. ok = the status was 2xx; error says in words why not. timeout is that of one attempt. It is tried again after failures of the network, 408, 425, 429 and 5xx. Only https, and only addresses of the public network; redrive.http_allow_cidr opens others, also for http. No redirects, no proxy, no cookies. At most 64 kB of the answer are kept. Host, status and attempts are kept in redrive.http_log. Not granted by grant_user: GRANT EXECUTE to who may call outside. Errors: 22004 NULL, 22023 invalid argument, 53000 no descriptors.';
-- Control: pause, resume, cancel, redrive, wait.

CREATE FUNCTION redrive._pause_batch(p_caller oid, p_batch_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
BEGIN
    IF b.state NOT IN ('ready', 'running', 'retrying') THEN
        RAISE EXCEPTION 'batch % cannot be paused', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Only a ready, running or retrying batch can be paused.';
    END IF;
    PERFORM redrive._pause(b, format('paused by %s', p_caller::regrole));
END
$$;

CREATE FUNCTION redrive.pause_batch(batch_id bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.pause_batch IS
'Stop a batch after the running commit interval of each worker. Errors: 42704 unknown batch, 42501 not yours, 55000 not live.';

CREATE FUNCTION redrive._resume_batch(p_caller oid, p_batch_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
    v_owner oid;
BEGIN
    IF b.state <> 'paused' THEN
        RAISE EXCEPTION 'batch % is not paused', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Only a paused batch can be resumed.';
    END IF;
    UPDATE redrive.batches
    SET pause_reason = NULL, last_progress_at = clock_timestamp(),
        -- whoever resumes it has seen the failures so far
        failures_accepted = failed + coalesce((SELECT sum(c.failed) FROM redrive.chunks AS c WHERE c.batch_id = p_batch_id AND NOT c.folded), 0),
        state = CASE WHEN started_at IS NULL THEN 'ready'
                     WHEN attempted_at IS NOT NULL AND claimed_to = total THEN 'retrying'
                     ELSE 'running' END::redrive.batch_state
    WHERE batch_id = p_batch_id;
    PERFORM redrive._fold(p_batch_id);
    SELECT owner INTO v_owner FROM redrive.handlers WHERE handler_id = b.handler_id;
    PERFORM redrive._wake(v_owner), redrive._notify(b.handler_id);
END
$$;

CREATE FUNCTION redrive.resume_batch(batch_id bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.resume_batch IS
'Let a paused batch go on, whether a user, a rule with action pause or tolerated_failures stopped it. Errors: 42704 unknown batch, 42501 not yours, 55000 not paused.';

-- Everything that no worker holds is cancelled at once; a worker in a chunk
-- ends its interval, sees the state and gives the rest back as cancelled.
CREATE FUNCTION redrive._cancel(b redrive.batches) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_pending bigint := b.total - b.claimed_to;
    v_waiting bigint;
    c redrive.chunks;
BEGIN
    UPDATE redrive.batches
    SET state = 'cancelled', pause_reason = NULL, claimed_to = total, cancelled = cancelled + v_pending, next_retry_at = NULL,
        oldest_failure_at = NULL
    WHERE batch_id = b.batch_id;
    PERFORM redrive._unlock_range(b, b.claimed_to + 1, b.total);
    FOR c IN
        SELECT * FROM redrive.chunks WHERE batch_id = b.batch_id AND state = 'orphaned' FOR UPDATE
    LOOP
        PERFORM redrive._cancel_chunk(b, c);
    END LOOP;
    v_waiting := redrive._end_waiting(b, 'cancelled', NULL, NULL);
    UPDATE redrive.batches SET cancelled = cancelled + v_waiting, waiting = waiting - v_waiting WHERE batch_id = b.batch_id;
    PERFORM redrive._fold(b.batch_id);
END
$$;

-- Make waiting failures final and unlock their keys; return how many.
CREATE FUNCTION redrive._end_waiting(b redrive.batches, p_state redrive.failure_state, p_reason redrive.fail_reason, p_before timestamptz) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_count bigint;
    v_keys text[];
BEGIN
    WITH ended AS (
        UPDATE redrive.failures AS f
        SET state = p_state, reason = p_reason, next_attempt_at = NULL
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'
          AND (p_before IS NULL OR f.first_failed_at <= p_before)
        RETURNING f.key
    )
    SELECT count(*), array_agg(ended.key) FILTER (WHERE ended.key IS NOT NULL) INTO v_count, v_keys FROM ended;
    PERFORM redrive._unlock_keys(b, v_keys);
    RETURN v_count;
END
$$;

CREATE FUNCTION redrive._cancel_batch(p_caller oid, p_batch_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
BEGIN
    IF b.state IN ('finished', 'cancelled') THEN
        RAISE EXCEPTION 'batch % cannot be cancelled', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Only a live batch can be cancelled.';
    END IF;
    PERFORM redrive._cancel(b);
    PERFORM redrive._wake(owner) FROM redrive.handlers WHERE handler_id = b.handler_id;
END
$$;

CREATE FUNCTION redrive.cancel_batch(batch_id bigint) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.cancel_batch IS
'Cancel a live batch: finished work stays, items that run end their commit interval, the others are not run; keys are unlocked. Errors: 42704 unknown batch, 42501 not yours, 55000 not live.';

CREATE FUNCTION redrive._redrive(p_caller oid, p_batch_id bigint, p_fingerprint text, p_error_class text, p_item_nos bigint[],
    p_canary int, p_canary_ratio float8) RETURNS int
LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan -- as in _take_up
AS $$
DECLARE
    b redrive.batches := redrive._lock_batch(p_caller, p_batch_id);
    v_now timestamptz := clock_timestamp();
    v_item_nos bigint[];
    v_held bigint[];
    v_count bigint;
    v_key record;
BEGIN
    IF p_canary < 1 THEN
        RAISE EXCEPTION 'canary must be positive' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', p_canary), HINT = 'Give the number of items to run first, or leave it out.';
    ELSIF p_canary_ratio IS NULL OR NOT (p_canary_ratio > 0 AND p_canary_ratio <= 1) THEN
        RAISE EXCEPTION 'canary_ratio must be above 0 and at most 1' USING ERRCODE = '22023',
            DETAIL = format('It is %s.', coalesce(p_canary_ratio::text, 'NULL')), HINT = 'Give the part of the canary items that has to succeed, for example 0.9.';
    END IF;
    IF b.state NOT IN ('finished', 'running', 'retrying') THEN
        RAISE EXCEPTION 'batch % cannot be redriven', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s".', b.state), HINT = 'Resume a paused batch first; a cancelled one stays cancelled.';
    END IF;
    IF p_canary IS NOT NULL AND EXISTS (SELECT FROM redrive.canaries AS c WHERE c.batch_id = p_batch_id AND c.decided_at IS NULL) THEN
        RAISE EXCEPTION 'batch % has a canary already', p_batch_id USING ERRCODE = '55000',
            DETAIL = 'Its items have not all ended.', HINT = format('See redrive.why(%s); wait for its end, or redrive without a canary.', p_batch_id);
    END IF;
    SELECT array_agg(f.item_no ORDER BY f.item_no), count(*) INTO v_item_nos, v_count
    FROM redrive.failures AS f
    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'failed'
      AND (p_fingerprint IS NULL OR f.fingerprint = p_fingerprint)
      AND (p_error_class IS NULL OR f.error_class = p_error_class)
      AND (p_item_nos IS NULL OR f.item_no = ANY (p_item_nos));
    IF v_count = 0 THEN
        RAISE EXCEPTION 'batch % has no failed items to redrive', p_batch_id USING ERRCODE = '55000',
            DETAIL = format('Its state is "%s", %s items failed.', b.state, b.failed),
            HINT = 'See redrive.failed_items for what can be redriven.';
    ELSIF v_count > p_canary THEN
        v_held := v_item_nos[p_canary + 1:];
        v_item_nos := v_item_nos[:p_canary];
        v_count := p_canary;
    END IF;
    IF b.keyed THEN
        -- The key of a failed item was unlocked: take it again, unless another batch has it now.
        INSERT INTO redrive.locks (handler_id, key, batch_id, item_no)
        SELECT b.handler_id, f.key, b.batch_id, f.item_no
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (v_item_nos) AND f.key IS NOT NULL
        ORDER BY f.key
        ON CONFLICT DO NOTHING;
        SELECT l.key, l.batch_id INTO v_key
        FROM redrive.failures AS f
        JOIN redrive.locks AS l ON l.handler_id = b.handler_id AND l.key = f.key
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (v_item_nos)
          AND (l.batch_id, l.item_no) IS DISTINCT FROM (f.batch_id, f.item_no)
        LIMIT 1;
        IF FOUND THEN
            RAISE EXCEPTION 'key "%" is locked', v_key.key USING ERRCODE = '55P03',
                DETAIL = format('Batch %s holds it.', v_key.batch_id),
                HINT = 'Wait for that batch, or redrive other items by item_nos.';
        END IF;
    END IF;

    UPDATE redrive.batches
    SET run_no = run_no + 1,
        -- whoever redrives some of them has seen the others
        failures_accepted = failed - v_count + coalesce((SELECT sum(c.failed) FROM redrive.chunks AS c WHERE c.batch_id = p_batch_id AND NOT c.folded), 0)
    WHERE batch_id = p_batch_id
    RETURNING * INTO b;
    IF v_held IS NOT NULL THEN
        INSERT INTO redrive.canaries (batch_id, run_no, items, needed, held)
        VALUES (p_batch_id, b.run_no, v_item_nos, ceil(round((v_count * p_canary_ratio)::numeric, 6)), v_held)
        ON CONFLICT (batch_id) DO UPDATE
        SET run_no = excluded.run_no, items = excluded.items, needed = excluded.needed, held = excluded.held, decided_at = NULL, released = NULL;
    END IF;
    PERFORM redrive._run_again(b, v_item_nos, v_now);
    RETURN b.run_no;
END
$$;

-- Take failed items of a locked batch up again, with their budgets afresh; they
-- have their keys.
CREATE FUNCTION redrive._run_again(b redrive.batches, p_item_nos bigint[], p_now timestamptz) RETURNS void
LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan -- as in _take_up
AS $$
DECLARE
    v_count int := cardinality(p_item_nos);
    v_size bigint;
BEGIN
    -- those that crashed the server have a fresh chance
    DELETE FROM redrive.crashes WHERE batch_id = b.batch_id AND item_no = ANY (p_item_nos);
    UPDATE redrive.batches
    SET state = 'running', failed = failed - v_count, finished_at = NULL, attempted_at = NULL, last_progress_at = p_now
    WHERE batch_id = b.batch_id
    RETURNING * INTO b;
    v_size := redrive._retry_size(b, current_setting('redrive.max_workers')::int, v_count);
    FOR i IN 0 .. (v_count - 1) / v_size LOOP
        PERFORM redrive._take_up(b, p_item_nos[i * v_size + 1:(i + 1) * v_size], p_now, NULL, NULL);
    END LOOP;
    PERFORM redrive._wake(h.owner), redrive._notify(h.handler_id) FROM redrive.handlers AS h WHERE h.handler_id = b.handler_id;
END
$$;

CREATE FUNCTION redrive.redrive(batch_id bigint, fingerprint text DEFAULT NULL, error_class text DEFAULT NULL, item_nos bigint[] DEFAULT NULL,
    canary int DEFAULT NULL, canary_ratio float8 DEFAULT 0.9) RETURNS int
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.redrive IS
'Run the failed items of a batch again, all of them or those of one fingerprint, error class or list of items, with a fresh retry budget, and two chances more if they crashed the server; return the number of the new run. Their keys are locked again. With canary, only that many of them run first, in order of item_no, and the others follow in the same run as soon as the part canary_ratio of the canary, rounded up, has succeeded; if that cannot be reached any more the others stay failed. Errors: 42704 unknown batch, 42501 not yours, 22023 canary or canary_ratio out of range, 55000 nothing to redrive or a canary is not decided, 55P03 key held by another batch.';

CREATE PROCEDURE redrive.wait(batch_id bigint, timeout interval DEFAULT NULL, INOUT state redrive.batch_state DEFAULT NULL)
LANGUAGE c AS 'MODULE_PATHNAME', 'redrive_wait';
COMMENT ON PROCEDURE redrive.wait IS
'Wait until a batch is finished, cancelled or paused, or until the timeout; state tells which. Holds no snapshot while it waits, so it cannot be called in a transaction block. Errors: 42704 unknown batch, 42501 not yours, 55000 when no workers can run it.';

CREATE PROCEDURE redrive.work(max_time interval DEFAULT NULL, until_idle boolean DEFAULT true)
LANGUAGE c AS 'MODULE_PATHNAME', 'redrive_work';
COMMENT ON PROCEDURE redrive.work IS
'Run batches of the handlers that the caller owns in this session, with the same engine as the workers: until nothing is due (until_idle), or for max_time. Commits as it goes, so it cannot be called in a transaction block.';
-- Views.  They are what people look at in psql, and the only way to the tables:
-- nobody has rights on those.  Each filters rows through redrive._visible, and
-- shows payloads, keys and messages only to roles with the rights of the
-- handler's owner.

-- Items p_from to p_to of a batch, reading only the blocks they are in.
CREATE FUNCTION redrive._items(p_part smallint, p_batch_id bigint, p_from bigint, p_to bigint)
RETURNS TABLE (item_no bigint, key text, payload jsonb)
LANGUAGE sql STABLE AS $$
    SELECT k.first_no + u.place - 1, u.key, u.payload
    FROM redrive.item_blocks AS k
    CROSS JOIN LATERAL unnest(k.keys, k.payloads) WITH ORDINALITY AS u (key, payload, place)
    WHERE k.part = $1 AND k.batch_id = $2 AND k.first_no <= $4
      AND k.first_no >= coalesce((
            SELECT o.first_no
            FROM redrive.item_blocks AS o
            WHERE o.part = $1 AND o.batch_id = $2 AND o.first_no <= $3
            ORDER BY o.first_no DESC
            LIMIT 1), 0)
      AND k.first_no + u.place - 1 BETWEEN $3 AND $4
$$;

CREATE VIEW redrive.items WITH (security_barrier) AS
SELECT k.part, k.batch_id, k.first_no + u.place - 1 AS item_no, u.key, u.payload
FROM redrive.item_blocks AS k
JOIN redrive.batches AS b ON b.batch_id = k.batch_id AND b.part = k.part
JOIN redrive._visible AS v ON v.handler_id = b.handler_id AND v.mine
CROSS JOIN LATERAL unnest(k.keys, k.payloads) WITH ORDINALITY AS u (key, payload, place);

-- Batches with their counters as they were committed.
CREATE VIEW redrive._batches AS
SELECT b.batch_id, b.handler_id, b.part, b.state, b.label, b.priority, b.run_no, b.total, b.claimed_to, b.keyed,
    b.succeeded + coalesce(u.succeeded, 0) AS succeeded,
    b.ignored + coalesce(u.ignored, 0) AS ignored,
    b.failed + coalesce(u.failed, 0) AS failed,
    b.cancelled + coalesce(u.cancelled, 0) AS cancelled,
    b.waiting + coalesce(u.waiting, 0) AS waiting,
    coalesce(u.running, 0) AS running,
    b.total - b.claimed_to + coalesce(u.pending, 0) AS pending,
    coalesce(u.running_chunks, 0) AS running_chunks,
    b.items_per_second, b.run_at, b.next_retry_at, b.created_at, b.sealed_at, b.started_at,
    greatest(b.last_progress_at, u.progress_at) AS last_progress_at,
    b.attempted_at, b.finished_at, b.pause_reason
FROM redrive.batches AS b
LEFT JOIN redrive._unfolded AS u ON u.batch_id = b.batch_id;

-- Items that a worker has done in the interval it has not committed yet are
-- counted as succeeded; those that failed in it are not classified for good
-- and still count as running.
CREATE VIEW redrive.batch_progress WITH (security_barrier) AS
SELECT p.batch_id, p.handler, p.label, p.state, p.run_no, p.total,
    p.succeeded, p.ignored, p.failed, p.cancelled, p.waiting, p.running, p.pending,
    CASE WHEN p.total > 0 THEN (p.final * 1000 / p.total)::numeric(5) * 0.1
         WHEN p.state = 'finished' THEN 100.0 END AS percent_done,
    round(nullif(p.rate, 0)::numeric, CASE WHEN p.rate < 1 THEN 3 WHEN p.rate < 10 THEN 1 ELSE 0 END) AS items_per_second,
    CASE WHEN p.state NOT IN ('running', 'retrying') THEN NULL
         WHEN p.running + p.pending = 0 THEN date_trunc('second', greatest(p.next_retry_at - now(), interval '0'))
         WHEN coalesce(p.pace, p.rate) > 0 THEN make_interval(secs => ceil(least((p.running + p.pending) / coalesce(p.pace, p.rate), 1e9))) END AS time_left,
    p.created_at, p.started_at, p.last_progress_at, p.finished_at,
    p.priority, p.run_at, p.next_retry_at, p.pause_reason
FROM (
    SELECT b.batch_id, v.name AS handler, b.label, b.state, b.run_no, b.total,
        b.succeeded + o.open AS succeeded, b.ignored, b.failed, b.cancelled, b.waiting, b.running - o.open AS running, b.pending,
        b.succeeded + o.open + b.ignored + b.failed + b.cancelled AS final,
        CASE
            WHEN s.rate > 0 THEN s.rate
            WHEN b.run_no > 1 THEN b.items_per_second
            ELSE (b.succeeded + b.ignored + b.failed + b.waiting)
                 / nullif(date_part('epoch', coalesce(b.attempted_at, b.finished_at, now()) - b.started_at), 0)
        END AS rate,
        -- the mean of the last chunks: a worker between two claims has no rate of its own
        nullif(b.items_per_second, 0) * greatest(b.running_chunks, 1) AS pace,
        b.created_at, b.started_at, b.last_progress_at, b.finished_at,
        b.priority, b.run_at, b.next_retry_at, CASE WHEN v.mine THEN b.pause_reason END AS pause_reason
    FROM redrive._batches AS b
    JOIN redrive._visible AS v ON v.handler_id = b.handler_id
    LEFT JOIN (
        SELECT x.batch_id, sum(x.open_succeeded)::bigint AS open, sum(x.items_per_second) AS rate
        FROM redrive._slots() AS x
        WHERE x.chunk_id IS NOT NULL
        GROUP BY x.batch_id
    ) AS s ON s.batch_id = b.batch_id
    CROSS JOIN LATERAL (SELECT least(coalesce(s.open, 0), b.running) AS open) AS o
) AS p;

CREATE VIEW redrive.stale_batches WITH (security_barrier) AS
SELECT s.batch_id, s.handler, s.reason, s.since, s.action
FROM redrive.stale_batches_at(now()) AS s;

CREATE VIEW redrive.failed_items WITH (security_barrier) AS
SELECT f.batch_id, f.item_no,
    CASE WHEN v.mine THEN f.key END AS key,
    f.state, f.reason, f.error_class, f.sqlstate,
    CASE WHEN v.mine THEN f.message END AS message,
    CASE WHEN v.mine THEN f.detail END AS detail,
    CASE WHEN v.mine THEN f.hint END AS hint,
    CASE WHEN v.mine THEN f.context END AS context,
    f.constraint_name, f.fingerprint, f.retry_count, f.first_failed_at, f.last_failed_at, f.next_attempt_at,
    v.name AS handler, f.attempts, f.run_no
FROM redrive.failures AS f
JOIN redrive.batches AS b ON b.batch_id = f.batch_id AND b.part = f.part
JOIN redrive._visible AS v ON v.handler_id = b.handler_id;

CREATE VIEW redrive.crashed_items WITH (security_barrier) AS
SELECT x.batch_id, x.item_no, v.name AS handler, x.crash_count, x.first_crashed_at, x.last_crashed_at
FROM redrive.crashes AS x
JOIN redrive.batches AS b ON b.batch_id = x.batch_id
JOIN redrive._visible AS v ON v.handler_id = b.handler_id
WHERE x.crash_count > 0;

CREATE VIEW redrive.failure_attempts WITH (security_barrier) AS
SELECT a.batch_id, a.item_no, a.attempt, a.run_no, a.failed_at, a.error_class, a.sqlstate,
    CASE WHEN v.mine THEN a.message END AS message,
    CASE WHEN v.mine THEN a.detail END AS detail,
    CASE WHEN v.mine THEN a.hint END AS hint,
    CASE WHEN v.mine THEN a.context END AS context,
    a.constraint_name, a.fingerprint
FROM (
    SELECT l.part, l.batch_id, l.item_no, l.attempt, l.run_no, l.failed_at, l.error_class, l.sqlstate,
        l.message, l.detail, l.hint, l.context, l.constraint_name, l.fingerprint
    FROM redrive.failure_log AS l
    UNION ALL
    SELECT f.part, f.batch_id, f.item_no, f.attempts, f.run_no, f.last_failed_at, f.error_class, f.sqlstate,
        f.message, f.detail, f.hint, f.context, f.constraint_name, f.fingerprint
    FROM redrive.failures AS f
) AS a
JOIN redrive.batches AS b ON b.batch_id = a.batch_id AND b.part = a.part
JOIN redrive._visible AS v ON v.handler_id = b.handler_id;

CREATE VIEW redrive.failure_groups WITH (security_barrier) AS
SELECT v.name AS handler, g.fingerprint, g.error_class, g.sqlstate,
    CASE WHEN v.mine THEN g.sample_message END AS sample_message,
    g.items, g.waiting, g.failed, g.first_seen, g.last_seen
FROM (
    SELECT f.handler_id, f.fingerprint, f.error_class, f.sqlstate,
        min(f.message) AS sample_message,
        count(*) AS items,
        count(*) FILTER (WHERE f.state = 'waiting') AS waiting,
        count(*) FILTER (WHERE f.state = 'failed') AS failed,
        min(f.first_failed_at) AS first_seen,
        max(f.last_failed_at) AS last_seen
    FROM redrive.failures AS f
    JOIN redrive.batches AS b ON b.batch_id = f.batch_id AND b.part = f.part
    GROUP BY f.handler_id, f.fingerprint, f.error_class, f.sqlstate
) AS g
JOIN redrive._visible AS v ON v.handler_id = g.handler_id;

-- Items that failed before and are run again by a chunk that is not done.
CREATE VIEW redrive._retrying AS
SELECT c.part, c.batch_id, c.chunk_id, u.item_no
FROM redrive.chunks AS c
JOIN redrive.retry_lists AS l ON l.chunk_id = c.chunk_id
CROSS JOIN LATERAL unnest(l.item_nos) AS u (item_no)
WHERE NOT c.folded AND c.kind = 'retry' AND c.state <> 'done' AND u.item_no > c.done_to AND (c.settled @> u.item_no) IS NOT TRUE;

CREATE VIEW redrive.item_status WITH (security_barrier) AS
SELECT b.batch_id, i.item_no,
    CASE WHEN v.mine THEN i.key END AS key,
    CASE
        WHEN f.state IS NOT NULL THEN f.state::text
        WHEN r.item_no IS NOT NULL THEN 'running'
        WHEN i.item_no > b.claimed_to THEN 'pending'
        WHEN c.state = 'running' THEN 'running'
        WHEN c.state = 'orphaned' THEN 'pending'
        WHEN b.state = 'cancelled' AND NOT EXISTS (
            SELECT FROM redrive.chunks AS d
            WHERE d.batch_id = b.batch_id AND d.kind = 'first' AND (i.item_no BETWEEN d.from_no AND d.done_to OR d.settled @> i.item_no)) THEN 'cancelled'
        ELSE 'succeeded'
    END AS state
FROM redrive.batches AS b
JOIN redrive._visible AS v ON v.handler_id = b.handler_id
JOIN (
    SELECT k.part, k.batch_id, k.first_no + u.place - 1 AS item_no, u.key
    FROM redrive.item_blocks AS k
    CROSS JOIN LATERAL ROWS FROM (unnest(k.keys), generate_series(1, k.items)) AS u (key, place)
) AS i ON i.part = b.part AND i.batch_id = b.batch_id
LEFT JOIN redrive.failures AS f ON f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = i.item_no
LEFT JOIN redrive._retrying AS r ON r.batch_id = b.batch_id AND r.item_no = i.item_no
LEFT JOIN redrive.chunks AS c
    ON c.batch_id = b.batch_id AND NOT c.folded AND c.state <> 'done' AND c.kind = 'first' AND i.item_no BETWEEN c.done_to + 1 AND c.to_no
    AND (c.settled @> i.item_no) IS NOT TRUE;

CREATE VIEW redrive.queue_stats WITH (security_barrier) AS
SELECT v.name AS handler,
    coalesce(q.workers, 0)::bigint AS workers,
    coalesce(q.ready, 0)::bigint AS ready,
    coalesce(q.delayed, 0)::bigint AS delayed,
    coalesce(q.in_flight, 0)::bigint AS in_flight,
    coalesce(q.waiting_retry, 0)::bigint AS waiting_retry,
    date_trunc('second', now() - q.ready_since) AS oldest_ready_age,
    v.max_workers, v.paused
FROM redrive._visible AS v
LEFT JOIN (
    SELECT b.handler_id,
        sum(b.running_chunks) AS workers,
        sum(b.pending) FILTER (WHERE r.ready) AS ready,
        sum(b.pending) FILTER (WHERE NOT r.ready) AS delayed,
        sum(b.running) AS in_flight,
        sum(b.waiting) AS waiting_retry,
        min(greatest(b.run_at, b.sealed_at)) FILTER (WHERE r.ready AND b.pending > 0) AS ready_since
    FROM redrive._batches AS b
    CROSS JOIN LATERAL (SELECT b.state IN ('ready', 'running', 'retrying') AND b.run_at <= now() AS ready) AS r
    WHERE b.state NOT IN ('finished', 'cancelled')
    GROUP BY b.handler_id
) AS q ON q.handler_id = v.handler_id;

-- The slots that a role may see are those that _slots() returns to it.
-- A server that did not preload the library has no slots: its foreground
-- workers are known by their chunks, as external ones always are.
CREATE VIEW redrive.workers WITH (security_barrier) AS
SELECT s.pid, s.kind, v.name AS handler, s.batch_id, s.chunk_id, s.state, s.item_no,
    s.item_started_at, s.open_succeeded, s.open_failed,
    round(s.items_per_second::numeric, CASE WHEN s.items_per_second < 1 THEN 3 WHEN s.items_per_second < 10 THEN 1 ELSE 0 END) AS items_per_second,
    s.claimed_at, pg_get_userbyid(s.owner) AS role, s.started_at, NULL::text AS worker, NULL::timestamptz AS lease_until
FROM redrive._slots() AS s
LEFT JOIN redrive._visible AS v ON v.handler_id = s.handler_id
UNION ALL
SELECT c.worker_pid, 'foreground', v.name, c.batch_id, c.chunk_id, 'running', NULL,
    NULL, NULL, NULL,
    NULL,
    c.claimed_at, pg_get_userbyid(v.owner), c.worker_started_at, NULL, NULL
FROM redrive.chunks AS c
JOIN redrive._visible AS v ON v.handler_id = c.handler_id
WHERE c.state = 'running' AND c.worker_pid IS NOT NULL AND NOT (SELECT redrive._preloaded())
UNION ALL
SELECT NULL, 'external', v.name, c.batch_id, c.chunk_id, 'running', NULL,
    NULL, NULL, NULL,
    NULL,
    c.claimed_at, pg_get_userbyid(v.owner), NULL, CASE WHEN v.mine THEN c.worker END, c.lease_until
FROM redrive.chunks AS c
JOIN redrive._visible AS v ON v.handler_id = c.handler_id
WHERE c.state = 'running' AND c.lease_until IS NOT NULL;

-- Everybody may know that the passes run; what they did counts batches of all.
CREATE VIEW redrive.pass_history WITH (security_barrier) AS
SELECT l.pass, l.as_of, l.started_at, l.finished_at,
    CASE WHEN m.monitor THEN l.acted END AS acted,
    CASE WHEN m.monitor THEN l.more END AS more,
    CASE WHEN m.monitor THEN l.detail END AS detail
FROM redrive.pass_log AS l
CROSS JOIN (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT') AS monitor) AS m;

-- Chunks that have ended, for sums over time.
CREATE VIEW redrive._ended WITH (security_barrier) AS
SELECT c.finished_at, v.name AS handler, c.done, c.succeeded, c.ignored, c.failed
FROM redrive.chunks AS c
JOIN redrive._visible AS v ON v.handler_id = c.handler_id
WHERE c.state = 'done';

CREATE VIEW redrive.throughput WITH (security_barrier) AS
SELECT t.minute, t.handler, t.items, t.succeeded, t.ignored, t.failed, t.to_retry,
    round(t.items / 60.0, CASE WHEN t.items < 600 THEN 1 ELSE 0 END) AS items_per_second
FROM (
    SELECT date_trunc('minute', e.finished_at) AS minute, e.handler,
        sum(e.done)::bigint AS items,
        sum(e.succeeded)::bigint AS succeeded,
        sum(e.ignored)::bigint AS ignored,
        sum(e.failed)::bigint AS failed,
        sum(e.done - e.succeeded - e.ignored - e.failed)::bigint AS to_retry
    FROM redrive._ended AS e
    WHERE e.finished_at > date_trunc('minute', now()) - interval '6 hours'
    GROUP BY 1, 2
) AS t;
-- Canary: a redrive that runs a few items first.  The others, which are held,
-- stay failed with their keys unlocked until enough of these have succeeded;
-- then they follow in the same run.  If too few can succeed any more, the held
-- ones stay as they are.

CREATE TABLE redrive.canaries (
    batch_id bigint NOT NULL,
    run_no int NOT NULL,
    items bigint[] NOT NULL,
    needed int NOT NULL,
    held bigint[] NOT NULL,
    decided_at timestamptz,
    released bigint,
    CONSTRAINT canaries_pkey PRIMARY KEY (batch_id),
    CONSTRAINT canaries_needed_check CHECK (needed BETWEEN 1 AND cardinality(items)),
    CONSTRAINT canaries_released_check CHECK (released IS NULL OR decided_at IS NOT NULL)
);

-- How far the canary of a batch is.  An item that succeeded has left no row.
CREATE FUNCTION redrive._canary(b redrive.batches, OUT succeeded bigint, OUT live bigint)
LANGUAGE sql STABLE AS $$
    SELECT count(*) FILTER (WHERE f.state IS NULL AND r.item_no IS NULL),
        count(*) FILTER (WHERE f.state = 'waiting' OR r.item_no IS NOT NULL)
    FROM redrive.canaries AS c
    CROSS JOIN LATERAL unnest(c.items) AS i (item_no)
    LEFT JOIN redrive.failures AS f ON f.part = $1.part AND f.batch_id = c.batch_id AND f.item_no = i.item_no
    LEFT JOIN redrive._retrying AS r ON r.batch_id = c.batch_id AND r.item_no = i.item_no
    WHERE c.batch_id = $1.batch_id
$$;

-- Decide about the held items as soon as it is clear; true when they follow.
-- Part of _fold(), which holds the lock of the batch: what a crash swallows is
-- done again with it.
CREATE FUNCTION redrive._judge_canary(b redrive.batches) RETURNS boolean
LANGUAGE plpgsql
SET plan_cache_mode = force_custom_plan -- as in _take_up
AS $$
DECLARE
    c redrive.canaries;
    v record;
    v_item_nos bigint[];
    v_count int;
BEGIN
    SELECT * INTO c FROM redrive.canaries AS x WHERE x.batch_id = b.batch_id AND x.decided_at IS NULL;
    IF NOT FOUND OR b.state NOT IN ('running', 'retrying') THEN
        RETURN false;
    END IF;
    SELECT * INTO v FROM redrive._canary(b);
    IF v.succeeded < c.needed THEN
        IF v.succeeded + v.live < c.needed THEN
            UPDATE redrive.canaries SET decided_at = clock_timestamp(), run_no = b.run_no WHERE batch_id = b.batch_id;
        END IF;
        RETURN false;
    END IF;

    -- what was redriven otherwise meanwhile is of a later run, or not failed
    SELECT array_agg(f.item_no ORDER BY f.item_no) INTO v_item_nos
    FROM redrive.failures AS f
    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (c.held) AND f.state = 'failed' AND f.run_no < c.run_no;
    IF b.keyed THEN
        INSERT INTO redrive.locks (handler_id, key, batch_id, item_no)
        SELECT b.handler_id, f.key, b.batch_id, f.item_no
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (v_item_nos) AND f.key IS NOT NULL
        ORDER BY f.key
        ON CONFLICT DO NOTHING;
        -- less those whose key another batch has taken
        SELECT array_agg(f.item_no ORDER BY f.item_no) INTO v_item_nos
        FROM redrive.failures AS f
        LEFT JOIN redrive.locks AS l ON l.handler_id = b.handler_id AND l.key = f.key
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.item_no = ANY (v_item_nos)
          AND (f.key IS NULL OR (l.batch_id, l.item_no) = (f.batch_id, f.item_no));
    END IF;
    v_count := coalesce(cardinality(v_item_nos), 0);
    UPDATE redrive.canaries SET decided_at = clock_timestamp(), run_no = b.run_no, released = v_count WHERE batch_id = b.batch_id;
    IF v_count = 0 THEN
        RETURN false;
    END IF;
    UPDATE redrive.batches SET failures_accepted = greatest(failures_accepted - v_count, 0) WHERE batch_id = b.batch_id;
    PERFORM redrive._run_again(b, v_item_nos, clock_timestamp());
    RETURN true;
END
$$;
-- Views of the task centre, by the same rules as those of batches: owners and
-- their members see their own, monitors no keys, payloads or messages.

CREATE VIEW redrive.task_status WITH (security_barrier) AS
SELECT t.task_key, t.process, t.status, t.version, t.is_test, t.created_at, t.changed_at, t.payload, pg_get_userbyid(t.owner) AS owner
FROM redrive.tasks AS t
WHERE pg_has_role(t.owner::oid, 'USAGE');

CREATE VIEW redrive.push_status WITH (security_barrier) AS
SELECT CASE WHEN m.mine THEN t.task_key END AS task_key, p.name AS platform, u.state, u.wanted_status, u.pushed_status, u.retry_count,
    CASE WHEN u.state IN ('pending', 'waiting') THEN u.next_attempt_at END AS next_attempt_at, u.failed_at, u.http_status,
    CASE WHEN m.mine THEN u.message END AS message,
    u.error_class, u.wanted_version, u.pushed_version, u.attempt_no AS attempts, u.delivered_at, u.lease_until
FROM redrive.pushes AS u
JOIN redrive.platforms AS p ON p.platform_id = u.platform_id
JOIN redrive.tasks AS t ON t.task_id = u.task_id
CROSS JOIN LATERAL (SELECT pg_has_role(p.owner::oid, 'USAGE') AS mine) AS m
WHERE pg_has_role(p.owner::oid, 'USAGE') OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

CREATE VIEW redrive.push_attempts WITH (security_barrier) AS
SELECT CASE WHEN m.mine THEN t.task_key END AS task_key, p.name AS platform, l.attempt_no, l.version, l.started_at, l.finished_at,
    l.delivered, l.charged, l.is_probe, l.error_class, l.http_status, l.curl_code,
    CASE WHEN m.mine THEN l.message END AS message,
    CASE WHEN m.mine THEN l.response END AS response
FROM redrive.push_log AS l
JOIN redrive.platforms AS p ON p.platform_id = l.platform_id
JOIN redrive.pushes AS u ON u.push_id = l.push_id
JOIN redrive.tasks AS t ON t.task_id = u.task_id
CROSS JOIN LATERAL (SELECT pg_has_role(p.owner::oid, 'USAGE') AS mine) AS m
WHERE pg_has_role(p.owner::oid, 'USAGE') OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

CREATE VIEW redrive.platform_health WITH (security_barrier) AS
SELECT p.name AS platform, p.paused, s.breaker, s.reason, s.blocked_until,
    q.due, q.in_flight, q.waiting, q.dead, q.blocked, date_trunc('second', q.oldest_due_age) AS oldest_due_age,
    s.attempts, s.delivered, s.last_delivered_at, s.last_failed_at,
    round(r.n / 300.0, 1) AS per_second, r.p50_ms, r.p95_ms, s.in_flight_limit, p.max_in_flight
FROM redrive.platforms AS p
JOIN redrive.platform_states AS s ON s.platform_id = p.platform_id
CROSS JOIN LATERAL (
    SELECT count(*) FILTER (WHERE u.state IN ('pending', 'waiting') AND u.next_attempt_at <= now()) AS due,
        count(*) FILTER (WHERE u.state = 'in_flight') AS in_flight,
        count(*) FILTER (WHERE u.state = 'waiting' AND u.next_attempt_at > now()) AS waiting,
        count(*) FILTER (WHERE u.state = 'dead') AS dead,
        count(*) FILTER (WHERE u.state = 'blocked') AS blocked,
        now() - min(u.next_attempt_at) FILTER (WHERE u.state IN ('pending', 'waiting') AND u.next_attempt_at <= now()) AS oldest_due_age
    FROM redrive.pushes AS u
    WHERE u.platform_id = p.platform_id AND u.state <> 'delivered') AS q
CROSS JOIN LATERAL (
    SELECT count(*) AS n,
        round((percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM l.finished_at - l.started_at)) * 1000)::numeric, 1) AS p50_ms,
        round((percentile_cont(0.95) WITHIN GROUP (ORDER BY extract(epoch FROM l.finished_at - l.started_at)) * 1000)::numeric, 1) AS p95_ms
    FROM redrive.push_log AS l
    WHERE l.platform_id = p.platform_id AND l.finished_at > now() - interval '5 min') AS r
WHERE pg_has_role(p.owner::oid, 'USAGE') OR (SELECT has_column_privilege('redrive.batches'::regclass, 'batch_id', 'SELECT'));

CREATE VIEW redrive.http_requests WITH (security_barrier) AS
SELECT h.requested_at, pg_get_userbyid(h.requested_by) AS role, h.method, h.host, h.ok, h.http_status, h.attempts, h.milliseconds, h.error
FROM redrive.http_log AS h
WHERE pg_has_role(h.requested_by::oid, 'USAGE');

-- Why a status has not arrived.
CREATE FUNCTION redrive._why_push(p_caller oid, p_task_key text, p_platform text) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    p redrive.platforms := redrive._platform(p_caller, p_platform);
    t redrive.tasks;
    u redrive.pushes;
    s redrive.platform_states;
BEGIN
    IF p_task_key IS NULL THEN
        RAISE EXCEPTION 'task_key must not be null' USING ERRCODE = '22004', HINT = 'Give the key that the task was recorded with.';
    END IF;
    SELECT * INTO t FROM redrive.tasks AS x WHERE x.owner = p.owner AND x.task_key = p_task_key;
    IF NOT FOUND THEN
        RETURN QUERY SELECT 'not recorded', format('Role "%s", the owner of the platform, has no task of this key.', pg_get_userbyid(p.owner)),
            'Record it as this role: SELECT redrive.record_task(...), or redrive.attach_task_source(...).';
        RETURN;
    END IF;
    SELECT * INTO u FROM redrive.pushes AS x WHERE x.task_id = t.task_id AND x.platform_id = p.platform_id;
    IF t.is_test THEN
        RETURN QUERY SELECT 'is a test', 'Tests are recorded and not pushed.', NULL::text;
    ELSIF u.push_id IS NULL THEN
        RETURN QUERY SELECT 'not planned', format('The task changed at %s; push_window is %s.', t.changed_at, p.push_window), 'CALL redrive.run_pass(''push_tasks'');';
    ELSIF u.state = 'delivered' THEN
        RETURN QUERY SELECT 'delivered', format('Status "%s", version %s, at %s.', u.pushed_status, u.pushed_version, u.delivered_at), NULL::text;
    ELSIF u.state = 'in_flight' THEN
        RETURN QUERY SELECT 'being sent', format('Attempt %s; if nothing is known of it at %s it is tried again.', u.attempt_no, u.lease_until), NULL::text;
    ELSIF u.state = 'dead' THEN
        RETURN QUERY SELECT 'given up', format('After %s attempts, the last at %s: %s', u.attempt_no, u.failed_at, u.message), format('SELECT redrive.redrive_push(%L, %L);', p.name, t.task_key);
    ELSIF u.state = 'blocked' THEN
        RETURN QUERY SELECT 'blocked', u.message, format('SELECT redrive.alter_platform(%L, ...);', p.name);
    ELSIF u.next_attempt_at > now() THEN
        RETURN QUERY SELECT 'waiting for a retry', format('Until %s. The last attempt: %s', u.next_attempt_at, u.message), format('SELECT redrive.redrive_push(%L, %L);', p.name, t.task_key);
    ELSIF u.awaits_build THEN
        RETURN QUERY SELECT 'not built yet', format('Due since %s; a worker of role "%s" calls %s first.', u.next_attempt_at, pg_get_userbyid(p.owner), p.build),
            'See why nothing runs: SELECT * FROM redrive.doctor();';
    ELSE
        RETURN QUERY SELECT 'due', format('Since %s.', u.next_attempt_at), NULL::text;
    END IF;
    IF u.state IN ('pending', 'waiting') THEN
        SELECT * INTO s FROM redrive.platform_states AS x WHERE x.platform_id = p.platform_id;
        IF p.paused THEN
            RETURN QUERY SELECT 'the platform is paused', coalesce('Reason: ' || s.reason || '.', 'By pause_platform().'), format('SELECT redrive.resume_platform(%L);', p.name);
        ELSIF s.breaker <> 'closed' THEN
            RETURN QUERY SELECT 'the breaker of the platform is ' || s.breaker, format('Until %s, because %s.', s.blocked_until, s.reason), format('SELECT redrive.resume_platform(%L);', p.name);
        END IF;
        IF p.secrets::text[] <> ARRAY(SELECT k.kind::text FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id ORDER BY k.kind) THEN
            RETURN QUERY SELECT 'secrets are missing', 'Dumps do not have them.', format('SELECT redrive.set_platform_secret(%L, ...);', p.name);
        END IF;
        IF NOT redrive._preloaded() THEN
            RETURN QUERY SELECT 'there are no workers', 'pg_redrive is not in shared_preload_libraries.', 'Add it and restart the server.';
        ELSIF NOT coalesce(current_setting('redrive.enabled', true), 'on')::boolean THEN
            RETURN QUERY SELECT 'redrive.enabled is off', 'Nothing is pushed.', 'ALTER SYSTEM SET redrive.enabled = on; SELECT pg_reload_conf();';
        ELSIF NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.backend_type = 'redrive pusher' AND a.datname = current_database()) THEN
            RETURN QUERY SELECT 'the pusher is not running', 'The supervisor starts it when there is a free worker process.', 'See max_worker_processes, and SELECT * FROM redrive.doctor();';
        END IF;
    END IF;
END
$$;

CREATE FUNCTION redrive.why_push(task_key text, platform text) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_rows_as_owner';
COMMENT ON FUNCTION redrive.why_push IS
'Why the status of a task has not arrived at a platform, and the statement that helps. Errors: 42704 unknown platform, 42501 not yours, 22004 NULL.';
-- Questions: why does a batch not move (why), and what is wrong here (doctor)?
--
-- The internal functions run with the rights of the extension and get the
-- caller's role.  They show of others' sessions what pg_stat_activity would
-- show that role, and of others' batches what a monitor may see.

-- The background processes that serve this database, and what keeps others
-- from being started; all NULL without preload.  executors: of the cluster.
CREATE FUNCTION redrive._processes(OUT launcher_pid int, OUT supervisor_pid int, OUT databases int, OUT executors int,
    OUT no_process_since timestamptz, OUT held_back oid[]) RETURNS record
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__processes';

CREATE FUNCTION redrive._library_version() RETURNS text
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive__library_version';

-- A role sees counts of all batches if it may read this column.
CREATE FUNCTION redrive._is_monitor(p_role oid) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT has_column_privilege($1, 'redrive.batches', 'batch_id', 'SELECT')
$$;

CREATE FUNCTION redrive._seconds(p_time timestamptz) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT to_char($1, 'YYYY-MM-DD HH24:MI:SSOF')
$$;

CREATE FUNCTION redrive._pass_runs(p_pass text) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT coalesce('It ran last at ' || redrive._seconds(max(l.started_at)) || '.', 'It has not run yet.')
    FROM redrive.pass_log AS l
    WHERE l.pass = $1
$$;

-- Who keeps a process waiting for a lock: one row for each, none if nobody.
CREATE FUNCTION redrive._blockers(p_caller oid, p_pids int[]) RETURNS TABLE (detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT CASE
            WHEN p.pid = 0 THEN 'a prepared transaction'
            WHEN pg_has_role($1, 'pg_read_all_stats', 'USAGE') OR pg_has_role($1, a.usesysid, 'USAGE')
                THEN format('pid %s (%s, %s, transaction since %s): %s', p.pid, a.usename, coalesce(a.state, a.backend_type),
                            redrive._seconds(a.xact_start), left(regexp_replace(a.query, '[[:space:]]+', ' ', 'g'), 300))
            ELSE format('pid %s', p.pid)
        END,
        CASE
            WHEN p.pid = 0 THEN 'SELECT * FROM pg_prepared_xacts; then COMMIT PREPARED or ROLLBACK PREPARED the right one'
            ELSE format('let it end its transaction, or SELECT pg_terminate_backend(%s);', p.pid)
        END
    FROM (SELECT DISTINCT x AS pid FROM unnest($2) AS x) AS p
    LEFT JOIN pg_stat_activity AS a ON a.pid = p.pid
    ORDER BY p.pid
$$;

-- What keeps a handler from running, whatever the batch.
CREATE FUNCTION redrive._handler_problems(p_handler_id int) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.handlers AS h
    LEFT JOIN pg_roles AS o ON o.oid = h.owner::oid
    -- workers of ours only run the callbacks of an external handler
    CROSS JOIN LATERAL (SELECT h.kind <> 'external' OR h.on_unlock IS NOT NULL OR h.on_finish IS NOT NULL AS needed) AS w
    CROSS JOIN LATERAL (
        SELECT 'owner gone' AS fact,
            format('The owner of handler "%s", role with oid %s, was dropped.', h.name, h.owner::oid) AS detail,
            format('UPDATE redrive.handlers SET owner = ''another_role'' WHERE name = %L;', h.name) AS remedy
        WHERE o.oid IS NULL
        UNION ALL
        SELECT 'owner cannot log in',
            format('Workers connect as role %s, the owner of handler "%s".', h.owner, h.name),
            format('ALTER ROLE %s LOGIN;', h.owner)
        WHERE w.needed AND NOT o.rolcanlogin AND current_setting('server_version_num')::int < 170000
        UNION ALL
        SELECT 'owner cannot connect',
            format('Role %s, the owner of handler "%s", has no right to connect to database "%s".', h.owner, h.name, current_database()),
            format('GRANT CONNECT ON DATABASE %I TO %s;', current_database(), h.owner)
        WHERE w.needed AND o.oid IS NOT NULL AND NOT has_database_privilege(o.oid, current_database(), 'CONNECT')
        UNION ALL
        SELECT CASE WHEN g.proc IS NULL THEN f.what || ' missing' ELSE f.what || ' not executable' END,
            CASE WHEN g.proc IS NULL THEN format('Function %s of handler "%s" does not exist.', f.signature, h.name)
                 ELSE format('Role %s, the owner of handler "%s", may not execute function %s.', h.owner, h.name, f.signature) END,
            CASE WHEN g.proc IS NULL THEN format('Create the function again, or name another one with redrive.alter_handler(%L, ...).', h.name)
                 WHEN has_function_privilege(o.oid, g.proc, 'EXECUTE') THEN format('GRANT USAGE ON SCHEMA %s TO %s;', p.pronamespace::regnamespace, h.owner)
                 ELSE format('GRANT EXECUTE ON FUNCTION %s TO %s;', f.signature, h.owner) END
        FROM (VALUES
            ('handler function', h.function || CASE h.signature WHEN 'payload' THEN '(jsonb)' WHEN 'key_payload' THEN '(text, jsonb)' WHEN 'item' THEN '(redrive.item)' WHEN 'items' THEN '(redrive.item[])' END),
            ('on_unlock', h.on_unlock || '(text)'),
            ('on_finish', h.on_finish || '(bigint, integer)')) AS f (what, signature)
        CROSS JOIN LATERAL (SELECT to_regprocedure(f.signature)::oid AS proc) AS g
        LEFT JOIN pg_proc AS p ON p.oid = g.proc
        WHERE f.signature IS NOT NULL
          AND (g.proc IS NULL
               OR (o.oid IS NOT NULL
                   AND NOT (has_function_privilege(o.oid, g.proc, 'EXECUTE') AND has_schema_privilege(o.oid, p.pronamespace, 'USAGE'))))
    ) AS r
    WHERE h.handler_id = $1
$$;

-- The workers of a batch, what they are in, and who blocks them.
CREATE FUNCTION redrive._why_workers(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.chunks AS c
    JOIN redrive.handlers AS h ON h.handler_id = c.handler_id
    JOIN redrive._running_chunks AS w ON w.chunk_id = c.chunk_id
    LEFT JOIN redrive._slots() AS s ON s.pid = c.worker_pid AND s.chunk_id = c.chunk_id
    CROSS JOIN LATERAL (
        SELECT CASE WHEN c.lease_until IS NULL THEN format('Pid %s has', c.worker_pid)
                 ELSE format('An external worker%s claimed', ' "' || CASE WHEN pg_has_role($1, h.owner::oid, 'USAGE') THEN c.worker END || '"') END
            || format(' items %s to %s of this batch', c.done_to + 1, c.to_no)
            || CASE WHEN c.kind = 'retry' THEN ', those of them that are tried again' ELSE '' END
            || coalesce(', and is in item ' || s.item_no || ' since ' || redrive._seconds(s.item_started_at), '') AS who,
            CASE WHEN w.alive AND c.lease_until IS NULL THEN pg_blocking_pids(c.worker_pid) ELSE '{}' END AS blocking
    ) AS k
    CROSS JOIN LATERAL (
        SELECT 'worker gone' AS fact,
            k.who || CASE WHEN c.lease_until IS NULL THEN '; this process is not there any more.' ELSE format('; its lease ended at %s.', redrive._seconds(w.lease_ends_at)) END AS detail,
            'CALL redrive.run_pass(''rescue_stale''); the supervisor does the same within 30 s' AS remedy
        WHERE NOT w.alive
        UNION ALL
        SELECT 'blocked by a lock', format('%s. It waits for %s', k.who, b.detail), b.remedy
        FROM redrive._blockers($1, k.blocking) AS b
        UNION ALL
        SELECT 'worker inside an item', k.who || '.',
            format('wait; or SELECT pg_cancel_backend(%s); to fail the item', c.worker_pid)
                || CASE WHEN h.item_timeout IS NULL THEN format('; SELECT redrive.alter_handler(%L, item_timeout => ''1 min''); limits all items', h.name) ELSE '' END
        WHERE w.alive AND k.blocking = '{}' AND s.item_no IS NOT NULL
        UNION ALL
        SELECT 'worker does nothing',
            k.who || format(CASE WHEN c.lease_until IS NULL THEN ', but is in none of them and has not committed since %s.'
                            ELSE ', and renews its lease, but has settled none since %s.' END, redrive._seconds(c.progress_at)),
            'CALL redrive.run_pass(''rescue_stale'');'
        WHERE w.alive AND k.blocking = '{}' AND s.item_no IS NULL AND w.stuck_from <= clock_timestamp()
        UNION ALL
        SELECT CASE WHEN c.lease_until IS NULL THEN 'running' ELSE 'claimed by an external worker' END,
            k.who || CASE WHEN c.lease_until IS NULL THEN format('; it committed last at %s.', redrive._seconds(c.progress_at))
                          ELSE format(' until %s; %s of them are left.', redrive._seconds(c.lease_until), c.items - c.done) END,
            NULL
        WHERE w.alive AND k.blocking = '{}' AND s.item_no IS NULL AND w.stuck_from > clock_timestamp()
    ) AS r
    WHERE c.batch_id = $2 AND c.state = 'running'
    ORDER BY c.chunk_id
$$;

-- What a batch waits for by itself, if it waits.
CREATE FUNCTION redrive._why_waits(p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.batches AS b
    JOIN redrive.handlers AS h ON h.handler_id = b.handler_id
    LEFT JOIN redrive._unfolded AS u ON u.batch_id = b.batch_id
    CROSS JOIN LATERAL (
        SELECT count(*) FILTER (WHERE f.next_attempt_at IS NULL) AS for_pass,
            count(*) FILTER (WHERE f.next_attempt_at > clock_timestamp()) AS later,
            min(f.next_attempt_at) AS next_at,
            max(f.next_attempt_at) AS last_at
        FROM redrive.failures AS f
        WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'waiting'
    ) AS f
    CROSS JOIN LATERAL (
        SELECT 'not due' AS fact, format('It was submitted to run at %s, not before.', redrive._seconds(b.run_at)) AS detail, 'wait, or cancel it and submit it anew' AS remedy
        WHERE b.claimable AND b.serve_after > clock_timestamp()
        UNION ALL
        SELECT 'waiting for a retry',
            CASE WHEN b.state = 'retrying' AND f.later = b.waiting
                 THEN format('All %s items that are left failed and wait, the first until %s, the last until %s.', f.later, redrive._seconds(f.next_at), redrive._seconds(f.last_at))
                 ELSE format('%s items failed and wait, the first until %s.', f.later, redrive._seconds(f.next_at)) END,
            format('wait; SELECT * FROM redrive.failed_items WHERE batch_id = %s; shows the errors', b.batch_id)
        WHERE f.later > 0
        UNION ALL
        SELECT 'waiting for the pass retry_failed',
            format('%s items failed and wait for a pass, as handler "%s" has no retry_delay. %s', f.for_pass, h.name, redrive._pass_runs('retry_failed')),
            'CALL redrive.run_pass(''retry_failed''); and to have it called: SELECT * FROM redrive.schedule_passes();'
        WHERE f.for_pass > 0
        UNION ALL
        SELECT 'retry time lost', format('Items are to be tried again from %s on, but the batch does not say so.', redrive._seconds(f.next_at)),
            'CALL redrive.run_pass(''retry_failed'');'
        WHERE b.next_retry_at IS NULL AND f.next_at IS NOT NULL
        UNION ALL
        SELECT 'all done, not marked so', 'All items are done, but the one who did the last could not write that down.',
            'CALL redrive.run_pass(''rescue_stale'');'
        WHERE b.claimed_to = b.total AND coalesce(u.running_chunks + u.orphaned_chunks, 0) = 0 AND (u.done_chunks > 0 OR b.waiting = 0)
    ) AS r
    WHERE b.batch_id = $1 AND b.state IN ('ready', 'running', 'retrying')
$$;

-- Why no application claims what a batch of an external handler has due.
CREATE FUNCTION redrive._why_not_claimed(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT r.fact, r.detail, r.remedy
    FROM redrive.batches AS b
    JOIN redrive.handlers AS h ON h.handler_id = b.handler_id
    CROSS JOIN LATERAL (
        SELECT (SELECT count(*) FROM redrive.chunks AS c WHERE c.handler_id = h.handler_id AND c.state = 'running') AS running,
            (SELECT max(c.claimed_at) FROM redrive.chunks AS c WHERE c.batch_id = b.batch_id) AS claimed_at
    ) AS k
    CROSS JOIN LATERAL (
        SELECT 'max_workers of the handler reached' AS fact,
            format('%s claims, as many as handler "%s" may have, are not ended.', k.running, h.name) AS detail,
            format('wait, or SELECT redrive.alter_handler(%L, max_workers => %s);', h.name, h.max_workers + 1) AS remedy
        WHERE k.running >= h.max_workers
        UNION ALL
        -- by whom the row is locked is in its xmax
        SELECT 'blocked by a lock', 'The batch is being changed by ' || x.detail, x.remedy
        FROM pg_locks AS l
        CROSS JOIN LATERAL redrive._blockers($1, ARRAY[coalesce(l.pid, 0)]) AS x
        WHERE l.locktype = 'transactionid' AND l.transactionid = b.xmax AND l.mode = 'ExclusiveLock' AND l.granted
          AND l.pid IS DISTINCT FROM pg_backend_pid()
        UNION ALL
        SELECT 'not claimed',
            'No application claims it. '
                || coalesce('The last claim was made at ' || redrive._seconds(k.claimed_at) || '.', 'Nothing of it was ever claimed.'),
            format('start a worker that calls redrive.claim(%L)', h.name)
        WHERE (k.running >= h.max_workers) IS NOT TRUE
    ) AS r
    WHERE b.batch_id = $2
$$;

-- Why nobody takes what a batch has due; no row when nothing is due.
CREATE FUNCTION redrive._why_not_taken(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    b redrive.batches;
    h redrive.handlers;
    w record;
    v_now timestamptz := clock_timestamp();
    v_max_workers int := current_setting('redrive.max_workers');
    v_orphaned record;
    v_busy bigint;
    v_before bigint;
    v_free bigint;
    v_blocked boolean := false;
BEGIN
    SELECT * INTO STRICT b FROM redrive.batches AS x WHERE x.batch_id = p_batch_id;
    SELECT * INTO STRICT h FROM redrive.handlers AS x WHERE x.handler_id = b.handler_id;
    SELECT * INTO w FROM redrive._processes();
    SELECT count(*) AS chunks, coalesce(sum(c.items - c.done), 0) AS items, max(c.rescue_count) AS lost INTO v_orphaned
    FROM redrive.chunks AS c
    WHERE c.batch_id = b.batch_id AND c.state = 'orphaned';
    IF b.state NOT IN ('ready', 'running', 'retrying')
       OR NOT (v_orphaned.chunks > 0 OR (b.claimable AND b.serve_after <= v_now) OR coalesce(b.next_retry_at <= v_now, false)) THEN
        RETURN;
    END IF;

    IF v_orphaned.chunks > 0 THEN
        RETURN QUERY VALUES ('orphaned items',
            format('%s items wait for a worker: another one gave them back, or they were redriven', v_orphaned.items)
                || CASE WHEN v_orphaned.lost > 0 THEN format('. Workers were lost with them %s times.', v_orphaned.lost) ELSE '.' END,
            NULL);
    END IF;

    -- what nobody but a person can change
    IF h.paused THEN
        RETURN QUERY VALUES ('handler paused', format('Nothing is started for handler "%s".', h.name), format('SELECT redrive.resume_handler(%L);', h.name));
    END IF;
    RETURN QUERY SELECT p.fact, p.detail, p.remedy FROM redrive._handler_problems(h.handler_id) AS p;
    v_blocked := h.paused OR FOUND;
    IF h.kind = 'external' THEN
        RETURN QUERY SELECT c.fact, c.detail, c.remedy FROM redrive._why_not_claimed(p_caller, p_batch_id) AS c WHERE NOT v_blocked;
        RETURN;
    END IF;
    IF pg_is_in_recovery() THEN
        RETURN QUERY VALUES ('standby', 'This server is a standby, workers run on the primary only.', 'ask the primary');
        RETURN;
    ELSIF NOT redrive._preloaded() THEN
        RETURN QUERY VALUES ('not preloaded', 'pg_redrive is not in shared_preload_libraries, so there are no workers.',
            format('CALL redrive.work(); as role %s; or add pg_redrive to shared_preload_libraries and restart the server', h.owner));
        RETURN;
    END IF;
    IF NOT current_setting('redrive.enabled')::boolean THEN
        RETURN QUERY VALUES ('redrive.enabled is off', 'No batch of the cluster is run.', 'ALTER SYSTEM SET redrive.enabled = on; SELECT pg_reload_conf();');
        RETURN;
    ELSIF v_max_workers = 0 THEN
        RETURN QUERY VALUES ('redrive.max_workers is 0', 'There are no workers.',
            format('CALL redrive.work(); as role %s; or ALTER SYSTEM SET redrive.max_workers = 4; SELECT pg_reload_conf();', h.owner));
        RETURN;
    ELSIF w.launcher_pid IS NULL OR w.supervisor_pid IS NULL THEN
        RETURN QUERY VALUES ('workers not running',
            CASE WHEN w.no_process_since IS NOT NULL
                 THEN format('The supervisor of this database cannot be started since %s: all of max_worker_processes, %s, are taken.', redrive._seconds(w.no_process_since), current_setting('max_worker_processes'))
                 WHEN w.launcher_pid IS NULL THEN 'The process "redrive launcher" is not there.'
                 ELSE 'The process "redrive supervisor" of this database is not there.' END,
            CASE WHEN w.no_process_since IS NOT NULL THEN 'ALTER SYSTEM SET max_worker_processes = ...; and restart the server'
                 WHEN w.launcher_pid IS NULL THEN 'look in the server log; if it says "too many background workers", increase max_worker_processes and restart the server'
                 ELSE 'look in the server log for its errors; it is started again within a minute' END);
        RETURN;
    END IF;

    -- what others have
    v_busy := (SELECT count(*) FROM redrive.chunks AS c WHERE c.handler_id = h.handler_id AND c.state = 'running');
    IF v_busy >= h.max_workers THEN
        RETURN QUERY VALUES ('max_workers of the handler reached',
            format('%s workers, as many as handler "%s" may have, are in batches %s.', v_busy, h.name,
                (SELECT string_agg(DISTINCT c.batch_id::text, ', ') FROM redrive.chunks AS c WHERE c.handler_id = h.handler_id AND c.state = 'running')),
            format('wait, or SELECT redrive.alter_handler(%L, max_workers => %s);', h.name, h.max_workers + 1));
        v_blocked := true;
    END IF;
    IF h.owner::oid = ANY (w.held_back) THEN
        RETURN QUERY VALUES ('executors end at once', format('Executors of role %s end as soon as they are started; this is tried again after a while, a minute at most.', h.owner),
            'look in the server log for their error');
        v_blocked := true;
    END IF;
    -- an executor that looks for work and cannot go on
    FOR fact, detail, remedy IN
        SELECT 'blocked by a lock', format('Pid %s looks for work of role %s, and waits for %s', s.pid, h.owner, k.detail), k.remedy
        FROM redrive._slots() AS s
        CROSS JOIN LATERAL redrive._blockers(p_caller, pg_blocking_pids(s.pid)) AS k
        WHERE s.owner = h.owner::oid AND s.chunk_id IS NULL
    LOOP
        v_blocked := true;
        RETURN NEXT;
    END LOOP;
    -- a claim passes over a batch whose row is locked: by whom is in its xmax
    FOR fact, detail, remedy IN
        SELECT 'blocked by a lock', 'The batch is being changed by ' || k.detail, k.remedy
        FROM redrive.batches AS x
        JOIN pg_locks AS l ON l.locktype = 'transactionid' AND l.transactionid = x.xmax AND l.mode = 'ExclusiveLock' AND l.granted
        CROSS JOIN LATERAL redrive._blockers(p_caller, ARRAY[coalesce(l.pid, 0)]) AS k
        WHERE x.batch_id = b.batch_id AND l.pid IS DISTINCT FROM pg_backend_pid()
    LOOP
        v_blocked := true;
        RETURN NEXT;
    END LOOP;
    IF v_blocked THEN
        RETURN;
    END IF;

    v_free := (SELECT count(*) FROM redrive._slots() AS s WHERE s.owner = h.owner::oid AND s.kind = 'executor' AND s.chunk_id IS NULL);
    v_busy := (SELECT count(*) FROM redrive._slots() AS s WHERE s.owner = h.owner::oid AND s.kind = 'executor' AND s.chunk_id IS NOT NULL);
    v_before := (
        SELECT count(*)
        FROM redrive.batches AS x
        JOIN redrive.handlers AS y ON y.handler_id = x.handler_id
        WHERE y.owner = h.owner AND x.batch_id <> b.batch_id AND NOT y.paused
          AND ((x.claimable AND x.serve_after <= v_now AND (x.priority > b.priority OR (x.priority = b.priority AND x.serve_after < b.serve_after)))
               OR (x.next_retry_at <= v_now AND x.state IN ('running', 'retrying') AND x.priority > b.priority)));
    IF v_free = 0 AND w.no_process_since IS NOT NULL THEN
        RETURN QUERY VALUES ('no free worker process',
            format('No executor can be started since %s: all of max_worker_processes, %s, are taken.', redrive._seconds(w.no_process_since), current_setting('max_worker_processes')),
            'ALTER SYSTEM SET max_worker_processes = ...; and restart the server');
    ELSIF v_free = 0 AND w.executors >= v_max_workers THEN
        RETURN QUERY VALUES ('no free executor',
            format('%s executors are all that redrive.max_workers allows; %s of them work for role %s in this database.', w.executors, v_busy, h.owner),
            format('wait, or ALTER SYSTEM SET redrive.max_workers = %s; SELECT pg_reload_conf();', w.executors + 1));
    END IF;
    IF v_before > 0 THEN
        RETURN QUERY VALUES ('other batches come first',
            format('%s other batches of role %s have a higher priority, or have waited longer at the same one; this one has priority %s.', v_before, h.owner, b.priority), 'wait');
    ELSIF v_free > 0 OR w.executors < v_max_workers THEN
        RETURN QUERY VALUES ('due', 'Nothing is in its way: a worker is called and takes it.', 'ask again; if it stays so, CALL redrive.run_pass(''rescue_stale'');');
    END IF;
END
$$;

CREATE FUNCTION redrive._why(p_caller oid, p_batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    b record;
    h redrive.handlers;
    v_mine boolean;
    v_held record;
    v_canary redrive.canaries;
BEGIN
    SELECT * INTO b FROM redrive._batches AS x WHERE x.batch_id = p_batch_id;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'batch % does not exist', coalesce(p_batch_id::text, 'NULL') USING ERRCODE = '42704',
            HINT = 'See redrive.batch_progress for the batches there are.';
    END IF;
    SELECT * INTO STRICT h FROM redrive.handlers AS x WHERE x.handler_id = b.handler_id;
    v_mine := pg_has_role(p_caller, h.owner::oid, 'USAGE');
    IF NOT v_mine AND NOT redrive._is_monitor(p_caller) THEN
        PERFORM redrive._check_member(p_caller, h.owner::oid, format('batch %s', p_batch_id));
    END IF;

    CASE b.state
        WHEN 'finished' THEN
            RETURN QUERY VALUES ('finished',
                format('Run %s ended at %s: of %s items %s succeeded, %s were ignored, %s failed.', b.run_no, redrive._seconds(b.finished_at), b.total, b.succeeded, b.ignored, b.failed),
                CASE WHEN b.failed > 0 THEN format('when the cause is mended: SELECT redrive.redrive(%s);', b.batch_id) END);
        WHEN 'cancelled' THEN
            RETURN QUERY VALUES ('cancelled',
                CASE WHEN b.finished_at IS NULL THEN 'Its workers are on the way out: each ends the item it is in.'
                     ELSE format('It ended at %s: of %s items %s succeeded, %s were ignored, %s failed, %s were cancelled.',
                        redrive._seconds(b.finished_at), b.total, b.succeeded, b.ignored, b.failed, b.cancelled) END,
                NULL::text);
        WHEN 'open' THEN
            RETURN QUERY VALUES ('not sealed', format('It has %s items so far, the last were added at %s, and runs only when it is sealed.', b.total, redrive._seconds(b.last_progress_at)),
                format('SELECT redrive.seal_batch(%1$s); or SELECT redrive.cancel_batch(%1$s);', b.batch_id));
        WHEN 'paused' THEN
            RETURN QUERY VALUES ('paused', CASE WHEN v_mine THEN b.pause_reason ELSE 'Only members of the owning role see by what.' END,
                format('when the cause is gone: SELECT redrive.resume_batch(%s);', b.batch_id));
            IF h.paused THEN
                RETURN QUERY VALUES ('handler paused', format('Nothing is started for handler "%s".', h.name), format('SELECT redrive.resume_handler(%L);', h.name));
            END IF;
            RETURN QUERY SELECT p.fact, p.detail, p.remedy FROM redrive._handler_problems(h.handler_id) AS p;
        ELSE
            NULL;
    END CASE;

    SELECT c.* INTO v_canary FROM redrive.canaries AS c WHERE c.batch_id = b.batch_id AND b.state <> 'cancelled';
    IF v_canary.decided_at IS NULL AND v_canary.batch_id IS NOT NULL THEN
        RETURN QUERY
        SELECT 'canary runs',
            format('%s of %s canary items succeeded; when it is %s, %s more items follow.', x.succeeded, cardinality(v_canary.items), v_canary.needed, cardinality(v_canary.held)),
            format('wait, or run all without waiting for it: SELECT redrive.redrive(%s);', b.batch_id)
        FROM redrive.batches AS y
        CROSS JOIN LATERAL redrive._canary(y) AS x
        WHERE y.batch_id = b.batch_id;
    ELSIF v_canary.run_no = b.run_no AND v_canary.released IS NULL THEN
        RETURN QUERY VALUES ('canary failed',
            format('Fewer than %s of its %s items succeeded, so %s others were not run and stay failed.', v_canary.needed, cardinality(v_canary.items), cardinality(v_canary.held)),
            format('when the cause is mended: SELECT redrive.redrive(%s, canary => %s);', b.batch_id, cardinality(v_canary.items)));
    ELSIF v_canary.run_no = b.run_no AND v_canary.released < cardinality(v_canary.held) THEN
        RETURN QUERY VALUES ('canary succeeded',
            format('%s items followed it, %s did not and stay failed: another batch had their keys, or they were redriven meanwhile.',
                v_canary.released, cardinality(v_canary.held) - v_canary.released), NULL);
    END IF;

    -- callbacks outlive the batch
    RETURN QUERY
    SELECT 'callback waiting',
        format('%s calls of %s are not made yet, %s.', count(*), k.kind,
            CASE WHEN bool_and(k.next_attempt_at IS NULL) THEN 'and will not: it crashed the server twice'
                 WHEN max(k.failures) > 0 THEN format('it failed %s times and is called again at %s', max(k.failures), redrive._seconds(min(k.next_attempt_at)))
                 ELSE format('due since %s', redrive._seconds(min(k.next_attempt_at))) END)
            || CASE WHEN v_mine THEN coalesce(' The last error: ' || max(k.message), '') ELSE '' END,
        CASE WHEN bool_and(k.next_attempt_at IS NULL) THEN format('when it is mended: UPDATE redrive.callbacks SET crash_count = 0, next_attempt_at = now() WHERE batch_id = %s AND next_attempt_at IS NULL;', b.batch_id)
             ELSE 'an executor of the owner, or CALL redrive.work(); makes them' END
    FROM redrive.callbacks AS k
    WHERE k.batch_id = b.batch_id
    GROUP BY k.kind, k.next_attempt_at IS NULL
    ORDER BY k.kind, k.next_attempt_at IS NULL;
    SELECT count(*) AS keys, min(l.batch_id) AS batch_id INTO v_held
    FROM redrive.failures AS f
    JOIN redrive.locks AS l ON l.handler_id = f.handler_id AND l.key = f.key AND (l.batch_id, l.item_no) <> (f.batch_id, f.item_no)
    WHERE f.part = b.part AND f.batch_id = b.batch_id AND f.state = 'failed';
    IF v_held.keys > 0 THEN
        RETURN QUERY VALUES ('keys are held by another batch', format('%s failed items cannot be redriven now, as another batch has their keys, for example %s.', v_held.keys, v_held.batch_id),
            format('SELECT * FROM redrive.why(%s);', v_held.batch_id));
    END IF;

    RETURN QUERY SELECT w.fact, w.detail, w.remedy FROM redrive._why_workers(p_caller, p_batch_id) AS w;
    RETURN QUERY SELECT w.fact, w.detail, w.remedy FROM redrive._why_waits(p_batch_id) AS w;
    -- with a worker in it that is not blocked it moves
    IF NOT EXISTS (
        SELECT FROM redrive.chunks AS c
        JOIN redrive._running_chunks AS r ON r.chunk_id = c.chunk_id
        WHERE c.batch_id = p_batch_id AND r.alive AND coalesce(pg_blocking_pids(c.worker_pid), '{}') = '{}') THEN
        RETURN QUERY SELECT w.fact, w.detail, w.remedy FROM redrive._why_not_taken(p_caller, p_batch_id) AS w;
    END IF;
END
$$;

CREATE FUNCTION redrive.why(batch_id bigint) RETURNS TABLE (fact text, detail text, remedy text)
LANGUAGE c STABLE ROWS 3 AS 'MODULE_PATHNAME', 'redrive_rows_as_owner';
COMMENT ON FUNCTION redrive.why IS
'Why a batch does not move, or what it is doing: one row per fact, with the statement that helps. The query of a session that blocks it is shown to those who may see it in pg_stat_activity. Errors: 42704 unknown batch, 42501 not yours.';
-- Doctor: what is wrong with the set-up.  Each function here looks at one
-- side of it and returns a row for each thing that is wrong; time is an
-- argument, as in the passes.
--
-- error = batches do not run, or rows are wrong; warning = it will make trouble.

CREATE FUNCTION redrive._doctor_settings() RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    w record;
    v_version text;
    v_wanted int;
BEGIN
    SELECT * INTO w FROM redrive._processes();
    v_version := (SELECT e.extversion FROM pg_extension AS e WHERE e.extname = 'pg_redrive');
    IF redrive._library_version() <> v_version THEN
        RETURN QUERY VALUES ('error', format('The library is of version %s, the SQL objects of this database are of version %s.', redrive._library_version(), v_version),
            'restart the server, if new files were installed since it started; then ALTER EXTENSION pg_redrive UPDATE;');
    END IF;

    IF NOT redrive._preloaded() THEN
        RETURN QUERY VALUES ('error', format('pg_redrive is not preloaded, so there are no workers: shared_preload_libraries is "%s".', current_setting('shared_preload_libraries')),
            'add pg_redrive to shared_preload_libraries and restart the server; until then CALL redrive.work();');
    ELSE
        IF NOT current_setting('redrive.enabled')::boolean THEN
            RETURN QUERY VALUES ('error', 'redrive.enabled is off: no batch is run and passes do nothing.', 'ALTER SYSTEM SET redrive.enabled = on; SELECT pg_reload_conf();');
        END IF;
        IF current_setting('redrive.max_workers') = '0' THEN
            RETURN QUERY VALUES ('error', 'redrive.max_workers is 0: there are no workers.', 'ALTER SYSTEM SET redrive.max_workers = 4; SELECT pg_reload_conf();');
        END IF;
        IF pg_is_in_recovery() THEN
            NULL;
        ELSIF w.no_process_since IS NOT NULL THEN
            RETURN QUERY VALUES ('error', format('A worker is wanted and cannot be started since %s, as all of max_worker_processes, %s, are taken.',
                    redrive._seconds(w.no_process_since), current_setting('max_worker_processes')),
                'ALTER SYSTEM SET max_worker_processes = ...; and restart the server');
        ELSIF w.launcher_pid IS NULL THEN
            RETURN QUERY VALUES ('error', 'The process "redrive launcher" is not there.', 'look in the server log; if it says "too many background workers", increase max_worker_processes and restart the server');
        ELSIF w.supervisor_pid IS NULL THEN
            RETURN QUERY VALUES ('error', 'The process "redrive supervisor" of this database is not there.',
                'look in the server log for its errors; it is started again within a minute, if redrive.max_databases is high enough');
        END IF;
        RETURN QUERY
        SELECT 'error', format('Executors of role %s end as soon as they are started.', o::regrole), 'look in the server log for their error'
        FROM unnest(w.held_back) AS o;
        -- launcher, supervisors, executors; pg_cron and the three passes; logical replication launcher; a parallel query
        v_wanted := 1 + greatest(w.databases, 1) + current_setting('redrive.max_workers')::int
            + redrive._cron_processes()
            + (current_setting('max_logical_replication_workers')::int > 0)::int
            + least(current_setting('max_parallel_workers_per_gather')::int, current_setting('max_parallel_workers')::int);
        IF v_wanted > current_setting('max_worker_processes')::int THEN
            RETURN QUERY VALUES ('warning',
                format('max_worker_processes is %s, and %s may be wanted: launcher, supervisors of %s databases, redrive.max_workers = %s, pg_cron, replication and a parallel query.',
                    current_setting('max_worker_processes'), v_wanted, greatest(w.databases, 1), current_setting('redrive.max_workers')),
                format('ALTER SYSTEM SET max_worker_processes = %s; and restart the server', greatest(16, v_wanted)));
        END IF;
    END IF;
    IF NOT current_setting('track_activities')::boolean THEN
        RETURN QUERY VALUES ('warning', 'track_activities is off, so why() cannot tell what a blocking session does.', 'ALTER SYSTEM SET track_activities = on; SELECT pg_reload_conf();');
    END IF;
END
$$;

-- What keeps vacuum from removing dead rows of our tables, and the clock.
CREATE FUNCTION redrive._doctor_server(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT 'warning', format('Pid %s (%s, %s) is in a transaction since %s, and keeps vacuum from removing dead rows.', a.pid, a.usename, coalesce(a.state, a.backend_type), redrive._seconds(a.xact_start)),
        format('let it end its transaction, or SELECT pg_terminate_backend(%s);', a.pid)
    FROM pg_stat_activity AS a
    WHERE (a.backend_xmin IS NOT NULL OR a.backend_xid IS NOT NULL) AND a.xact_start <= $1 - interval '10 min' AND a.backend_type <> 'autovacuum worker'
    UNION ALL
    SELECT 'warning', format('Transaction %L of %s is prepared since %s and not ended, and keeps vacuum from removing dead rows.', p.gid, p.owner, redrive._seconds(p.prepared)),
        format('in database %s: COMMIT PREPARED %2$L; or ROLLBACK PREPARED %2$L;', p.database, p.gid)
    FROM pg_prepared_xacts AS p
    WHERE p.prepared <= $1 - interval '10 min'
    UNION ALL
    SELECT 'warning', format('Replication slot %L is not in use, and keeps vacuum from removing rows since transaction %s.', s.slot_name, coalesce(s.xmin, s.catalog_xmin)),
        format('let its consumer go on, or SELECT pg_drop_replication_slot(%L);', s.slot_name)
    FROM pg_replication_slots AS s
    WHERE NOT s.active AND (s.xmin IS NOT NULL OR s.catalog_xmin IS NOT NULL)
    UNION ALL
    SELECT 'warning', format('%s is off: nothing removes dead rows.', o.name), format('ALTER SYSTEM SET %s = on; SELECT pg_reload_conf();', o.name)
    FROM unnest(ARRAY['autovacuum', 'track_counts']) AS o (name)
    WHERE NOT current_setting(o.name)::boolean
    UNION ALL
    SELECT 'warning', format('Autovacuum is off for %s.', c.oid::regclass), format('ALTER TABLE %s RESET (autovacuum_enabled);', c.oid::regclass)
    FROM pg_class AS c
    CROSS JOIN LATERAL pg_options_to_table(c.reloptions) AS o
    WHERE c.relnamespace = 'redrive'::regnamespace AND o.option_name = 'autovacuum_enabled' AND NOT o.option_value::boolean
    UNION ALL
    SELECT 'warning', format('%s has %s dead rows and %s live ones.', t.relid::regclass, t.n_dead_tup, t.n_live_tup), format('VACUUM %s; if that does not help, something above keeps old rows', t.relid::regclass)
    FROM pg_stat_all_tables AS t
    WHERE t.schemaname = 'redrive' AND t.n_dead_tup > 10000 AND t.n_dead_tup > t.n_live_tup
    UNION ALL
    SELECT 'warning', format('The last thing that was written down happened at %s, and now it is %s: the clock was set back.', redrive._seconds(l.last_at), redrive._seconds($1)),
        'set the clock right; until it has caught up, batches may wait longer than they should'
    FROM (
        SELECT greatest(
            (SELECT max(b.last_progress_at) FROM redrive.batches AS b WHERE b.state NOT IN ('finished', 'cancelled')),
            (SELECT max(c.finished_at) FROM redrive.chunks AS c WHERE c.state = 'done'),
            (SELECT max(p.started_at) FROM redrive.pass_log AS p)) AS last_at
    ) AS l
    WHERE l.last_at > $1 + interval '1 min'
$$;

-- Rows that point nowhere.  Items and failures may outlive their batch for a
-- while: purge removes batches first, and then truncates the part.
CREATE FUNCTION redrive._doctor_rows(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    WITH kept AS MATERIALIZED (
        SELECT p.part
        FROM redrive.rotation AS r
        CROSS JOIN LATERAL generate_series(0, r.parts - 1) AS p (part)
        WHERE redrive._part_state(p.part, $1 - r.retention) = 'kept'
    )
    SELECT 'error', format('%s rows of redrive.%s belong to a %s that does not exist.', o.n, o.name, o.of),
        format('report it; then DELETE FROM redrive.%1$I AS x WHERE NOT EXISTS (SELECT FROM redrive.%2$s AS y WHERE y.%3$s_id = x.%3$s_id);',
            o.name, CASE o.of WHEN 'chunk' THEN 'chunks' ELSE 'batches' END, o.of)
    FROM (
        SELECT 'chunks' AS name, 'batch' AS of, count(*) AS n FROM redrive.chunks AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'retry_lists', 'chunk', count(*) FROM redrive.retry_lists AS x
        WHERE NOT EXISTS (SELECT FROM redrive.chunks AS c WHERE c.chunk_id = x.chunk_id)
        UNION ALL
        SELECT 'crashes', 'batch', count(*) FROM redrive.crashes AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'canaries', 'batch', count(*) FROM redrive.canaries AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'callbacks', 'batch', count(*) FROM redrive.callbacks AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'locks', 'batch', count(*) FROM redrive.locks AS x
        WHERE NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'failures', 'batch', count(*) FROM redrive.failures AS x
        WHERE x.part IN (SELECT k.part FROM kept AS k) AND NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
        UNION ALL
        SELECT 'item_blocks', 'batch', count(*) FROM redrive.item_blocks AS x
        WHERE x.part IN (SELECT k.part FROM kept AS k) AND NOT EXISTS (SELECT FROM redrive.batches AS b WHERE b.batch_id = x.batch_id)
    ) AS o
    WHERE o.n > 0
    UNION ALL
    SELECT 'error', format('%s keys are locked by batches that ended, for example %s.', count(*), min(b.batch_id)),
        'report it; then DELETE FROM redrive.locks AS l USING redrive.batches AS b WHERE b.batch_id = l.batch_id AND b.finished_at IS NOT NULL;'
    FROM redrive.locks AS l
    JOIN redrive.batches AS b ON b.batch_id = l.batch_id
    WHERE b.finished_at IS NOT NULL
    HAVING count(*) > 0
    UNION ALL
    SELECT 'warning', format('%s batches are stale: %s, since %s. %s', count(*), s.reason, redrive._seconds(min(s.since)),
            CASE WHEN s.reason IN ('failed_recently', 'overdue_retry', 'expired') THEN redrive._pass_runs('retry_failed') ELSE redrive._pass_runs('rescue_stale') END),
        format('SELECT * FROM redrive.why(%s); CALL redrive.run_pass(%L);', min(s.batch_id),
            CASE WHEN s.reason IN ('failed_recently', 'overdue_retry', 'expired') THEN 'retry_failed' ELSE 'rescue_stale' END)
    FROM redrive.stale_batches_at($1) AS s
    GROUP BY s.reason
$$;

-- Handlers that cannot run, and settings of their owners that end workers.
CREATE FUNCTION redrive._doctor_handlers() RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT CASE WHEN EXISTS (SELECT FROM redrive.batches AS b WHERE b.handler_id = h.handler_id AND b.state NOT IN ('finished', 'cancelled'))
                THEN 'error' ELSE 'warning' END,
        p.detail, p.remedy
    FROM redrive.handlers AS h
    CROSS JOIN LATERAL redrive._handler_problems(h.handler_id) AS p
    UNION ALL
    SELECT 'warning',
        CASE s.name
            WHEN 'exit_on_error' THEN format('%s is %s for workers of role %s: an item that fails ends its worker.', s.name, s.value, s.owner)
            WHEN 'lock_timeout' THEN format('%s is %s for workers of role %s: one that waits longer for a lock may end.', s.name, s.value, s.owner)
            ELSE format('%s is %s for workers of role %s: one whose transaction takes longer ends.', s.name, s.value, s.owner)
        END,
        format('ALTER ROLE %s IN DATABASE %I SET %s = %L;', s.owner, current_database(), s.name, s.harmless)
    FROM (
        -- the most special one counts, as at the start of a session
        SELECT DISTINCT ON (h.owner, w.name) h.owner, w.name, w.harmless, v.value
        FROM (SELECT DISTINCT x.owner FROM redrive.handlers AS x) AS h
        CROSS JOIN (VALUES ('exit_on_error', 'off'), ('lock_timeout', '0'), ('transaction_timeout', '0')) AS w (name, harmless)
        CROSS JOIN LATERAL (
            SELECT 1 AS place, substring(c FROM '=(.*)') AS value
            FROM pg_db_role_setting AS d
            CROSS JOIN LATERAL unnest(d.setconfig) AS c
            WHERE c LIKE w.name || '=%' AND d.setrole = h.owner::oid
              AND d.setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
            UNION ALL
            SELECT CASE WHEN d.setrole <> 0 THEN 2 WHEN d.setdatabase <> 0 THEN 3 ELSE 4 END, substring(c FROM '=(.*)')
            FROM pg_db_role_setting AS d
            CROSS JOIN LATERAL unnest(d.setconfig) AS c
            WHERE c LIKE w.name || '=%'
              AND ((d.setrole = h.owner::oid AND d.setdatabase = 0)
                   OR (d.setrole = 0 AND d.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database()))))
            UNION ALL
            SELECT 5, f.setting
            FROM pg_file_settings AS f
            WHERE f.name = w.name AND f.applied
        ) AS v
        ORDER BY h.owner, w.name, v.place
    ) AS s
    WHERE s.value NOT IN ('0', 'off', 'false', 'no')
$$;

-- Platforms: what keeps their pushes from being sent.
CREATE FUNCTION redrive._doctor_pushes(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE sql STABLE AS $$
    SELECT 'error', format('Secrets of platform "%s" are missing; nothing is pushed there.', p.name), format('SELECT redrive.set_platform_secret(%L, ...); dumps do not have them', p.name)
    FROM redrive.platforms AS p
    WHERE p.secrets::text[] <> ARRAY(SELECT k.kind::text FROM redrive.platform_secrets AS k WHERE k.platform_id = p.platform_id ORDER BY k.kind)
    UNION ALL
    SELECT 'warning', format('The breaker of platform "%s" is %s: %s.', p.name, replace(s.breaker::text, '_', ' '), s.reason), format('mend the platform; to try at once: SELECT redrive.resume_platform(%L);', p.name)
    FROM redrive.platforms AS p JOIN redrive.platform_states AS s ON s.platform_id = p.platform_id
    WHERE s.breaker <> 'closed' AND NOT p.paused
    UNION ALL
    SELECT 'warning', format('%s pushes to platform "%s" were given up.', count(*), p.name), format('SELECT * FROM redrive.push_status WHERE platform = %1$L AND state = ''dead''; when it is mended: SELECT redrive.redrive_push(%1$L);', p.name)
    FROM redrive.pushes AS u JOIN redrive.platforms AS p ON p.platform_id = u.platform_id
    WHERE u.state = 'dead'
    GROUP BY p.name
    UNION ALL
    SELECT 'error', format('%s pushes have been under way for longer than their lease.', count(*)), 'CALL redrive.run_pass(''push_tasks''); and look whether a process "redrive pusher" is in pg_stat_activity'
    FROM redrive.pushes AS u
    WHERE u.state = 'in_flight' AND u.lease_until < p_as_of - interval '1 min'
    HAVING count(*) > 0
    UNION ALL
    SELECT 'error', 'There are platforms, but the pusher is not running.', 'look in the server log for its errors; it takes one of max_worker_processes'
    WHERE EXISTS (SELECT FROM redrive.platforms AS p WHERE NOT p.paused) AND redrive._preloaded() AND coalesce(current_setting('redrive.enabled', true), 'on')::boolean
      AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.backend_type = 'redrive pusher' AND a.datname = current_database())
$$;

CREATE FUNCTION redrive._doctor_at(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    RETURN QUERY
    SELECT f.severity, f.finding, f.remedy
    FROM (
        SELECT 1 AS side, s.* FROM redrive._doctor_settings() AS s
        UNION ALL
        SELECT 2, s.* FROM redrive._doctor_handlers() AS s
        UNION ALL
        SELECT 3, s.* FROM redrive._doctor_rows(p_as_of) AS s
        UNION ALL
        SELECT 4, s.* FROM redrive._doctor_passes(p_as_of) AS s
        UNION ALL
        SELECT 5, s.* FROM redrive._doctor_pushes(p_as_of) AS s
        UNION ALL
        SELECT 6, s.* FROM redrive._doctor_server(p_as_of) AS s
    ) AS f
    ORDER BY f.severity, f.side, f.finding COLLATE "C";
    IF NOT FOUND THEN
        RETURN QUERY VALUES ('ok', 'Nothing is wrong.', NULL);
    END IF;
END
$$;

CREATE FUNCTION redrive._doctor(p_caller oid) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF NOT pg_has_role(p_caller, (SELECT e.extowner FROM pg_extension AS e WHERE e.extname = 'pg_redrive'), 'USAGE')
       AND NOT redrive._is_monitor(p_caller) THEN
        RAISE EXCEPTION 'permission denied for redrive.doctor()' USING ERRCODE = '42501',
            DETAIL = 'It tells of handlers and sessions of all roles.',
            HINT = 'Ask a superuser to call it, or to run redrive.grant_monitor() for your role; redrive.why() tells about your own batches.';
    END IF;
    RETURN QUERY SELECT d.severity, d.finding, d.remedy FROM redrive._doctor_at(clock_timestamp()) AS d;
END
$$;

CREATE FUNCTION redrive.doctor() RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE c STABLE ROWS 3 AS 'MODULE_PATHNAME', 'redrive_rows_as_owner';
COMMENT ON FUNCTION redrive.doctor IS
'What is wrong with the set-up of pg_redrive, errors first, each with the statement that helps; one row with severity ok if nothing is. For superusers, the owner of the extension and monitors. Errors: 42501 for others.';
-- Verify: prove the counters of a batch from its rows.

CREATE TYPE redrive.check_result AS (batch_id bigint, check_name text, expected bigint, actual bigint, ok boolean);
COMMENT ON TYPE redrive.check_result IS 'One check of redrive.verify(): what the rows say, what the counter says, and whether they agree';

-- All checks of all batches the current user may see; true at every commit.
CREATE VIEW redrive._verify WITH (security_barrier) AS
SELECT b.batch_id, r.check_name, r.expected, r.actual
FROM redrive._batches AS b
JOIN redrive._visible AS v ON v.handler_id = b.handler_id
LEFT JOIN (SELECT l.batch_id, count(*) AS locks FROM redrive.locks AS l GROUP BY l.batch_id) AS k ON k.batch_id = b.batch_id
CROSS JOIN LATERAL (
    SELECT coalesce(sum(i.items), 0) AS items, coalesce(max(i.first_no + i.items - 1), 0) AS last_no
    FROM redrive.item_blocks AS i
    WHERE i.part = b.part AND i.batch_id = b.batch_id
) AS i
CROSS JOIN LATERAL (
    SELECT count(*) AS all_states,
        count(*) FILTER (WHERE f.state = 'waiting') AS waiting,
        count(*) FILTER (WHERE f.state = 'failed') AS failed,
        count(*) FILTER (WHERE f.state = 'ignored') AS ignored,
        count(*) FILTER (WHERE f.state = 'cancelled') AS cancelled,
        count(f.key) FILTER (WHERE f.state = 'waiting') AS keyed
    FROM redrive.failures AS f
    WHERE f.part = b.part AND f.batch_id = b.batch_id
) AS f
CROSS JOIN LATERAL (
    SELECT count(*) AS items,
        count(*) FILTER (WHERE b.keyed AND (
            SELECT x.keys[y.item_no - x.first_no + 1]
            FROM redrive.item_blocks AS x
            WHERE x.part = b.part AND x.batch_id = b.batch_id AND x.first_no <= y.item_no
            ORDER BY x.first_no DESC
            LIMIT 1) IS NOT NULL) AS keyed
    FROM redrive._retrying AS y
    WHERE y.batch_id = b.batch_id
) AS y
CROSS JOIN LATERAL (
    -- covered: items in some first chunk that were not cancelled in it; overlap: items in two of them
    SELECT coalesce(sum(c.to_no - greatest(c.from_no, c.seen_to + 1) + 1) FILTER (WHERE c.kind = 'first' AND c.to_no > c.seen_to), 0)
            - coalesce(sum(c.to_no - c.done_to - c.settled) FILTER (WHERE c.kind = 'first' AND c.state = 'done'), 0) AS covered,
        coalesce(sum(least(c.to_no, c.seen_to) - c.from_no + 1) FILTER (WHERE c.kind = 'first' AND c.from_no <= least(c.to_no, c.seen_to)), 0) AS overlap,
        coalesce(sum(c.done) FILTER (WHERE c.kind = 'first'), 0) AS done,
        coalesce(sum(c.done_to - c.from_no + 1 + c.settled) FILTER (WHERE c.kind = 'first'), 0) AS done_to,
        coalesce(sum(c.items - c.done) FILTER (WHERE c.kind = 'retry' AND c.state <> 'done'), 0) AS retrying,
        count(*) AS chunks
    FROM (
        SELECT h.kind, h.state, h.from_no, h.to_no, h.done_to, h.items, h.done,
            coalesce((SELECT sum(upper(r) - lower(r)) FROM unnest(h.settled) AS r), 0) AS settled,
            coalesce(max(h.to_no) FILTER (WHERE h.kind = 'first') OVER (ORDER BY h.from_no, h.chunk_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS seen_to
        FROM redrive.chunks AS h
        WHERE h.batch_id = b.batch_id
    ) AS c
) AS c
CROSS JOIN LATERAL (
    SELECT 'total' AS check_name, b.total AS expected,
        b.succeeded + b.ignored + b.failed + b.cancelled + b.waiting + b.running + b.pending AS actual
    UNION ALL
    SELECT 'items', b.total, i.items
    UNION ALL
    SELECT 'item numbers', b.total, i.last_no
    UNION ALL
    SELECT 'succeeded', c.done - f.all_states - y.items, b.succeeded
    UNION ALL
    SELECT 'ignored', f.ignored, b.ignored
    UNION ALL
    SELECT 'failed', f.failed, b.failed
    UNION ALL
    SELECT 'waiting', f.waiting, b.waiting
    UNION ALL
    SELECT 'running retries', y.items, c.retrying
    UNION ALL
    SELECT 'cancelled', f.cancelled + CASE WHEN b.state = 'cancelled' THEN b.total - c.covered ELSE 0 END, b.cancelled
    UNION ALL
    SELECT 'claimed', b.claimed_to, c.covered
    WHERE b.state <> 'cancelled'
    UNION ALL
    SELECT 'claimed twice', 0, c.overlap
    UNION ALL
    SELECT 'done', c.done_to, c.done
    UNION ALL
    SELECT 'negative counters', 0,
        (b.succeeded < 0)::int + (b.ignored < 0)::int + (b.failed < 0)::int + (b.cancelled < 0)::int
        + (b.waiting < 0)::int + (b.running < 0)::int + (b.pending < 0)::int
    UNION ALL
    SELECT 'live items', 0, b.waiting + b.running + b.pending
    WHERE b.state = 'finished' OR b.finished_at IS NOT NULL
    UNION ALL
    SELECT 'locks', f.keyed + y.keyed + (
            SELECT count(*)
            FROM (
                SELECT b.claimed_to + 1 AS from_no, b.total AS to_no
                UNION ALL
                SELECT lower(r), upper(r) - 1
                FROM redrive.chunks AS h
                CROSS JOIN LATERAL unnest(int8multirange(int8range(h.done_to, h.to_no, '(]')) - coalesce(h.settled, '{}')) AS r
                WHERE h.batch_id = b.batch_id AND NOT h.folded AND h.kind = 'first' AND h.state <> 'done'
            ) AS g
            JOIN redrive.item_blocks AS x
                ON x.part = b.part AND x.batch_id = b.batch_id AND x.first_no <= g.to_no AND x.first_no + x.items > g.from_no
            CROSS JOIN LATERAL unnest(x.keys) WITH ORDINALITY AS u (key, place)
            WHERE b.keyed AND u.key IS NOT NULL AND x.first_no + u.place - 1 BETWEEN g.from_no AND g.to_no),
        coalesce(k.locks, 0)
) AS r;

CREATE FUNCTION redrive.verify(batch_id bigint DEFAULT NULL)
RETURNS SETOF redrive.check_result
LANGUAGE sql STABLE AS $$
    SELECT r.batch_id, r.check_name, r.expected, r.actual, r.expected = r.actual
    FROM redrive._verify AS r
    WHERE r.batch_id = $1
    UNION ALL
    SELECT r.batch_id, r.check_name, r.expected, r.actual, r.expected = r.actual
    FROM redrive._verify AS r
    WHERE $1 IS NULL
$$;
COMMENT ON FUNCTION redrive.verify IS
'Prove the counters of a batch, or of all you may see, from the rows they count: one row per check, ok tells. It holds at every commit, while workers run too; a row that is not ok is a bug worth reporting. Reads every failure and chunk of the batch.';
-- Report: one HTML page about everything, made of the views and therefore
-- showing each role what the views show it.
--
-- Elements are made by the server's XML functions, which escape whatever users
-- wrote; plain text are only the head and the style sheet below.

-- A list of rows as a table.  p_query names its columns as they shall read; a
-- column "progress" holds a percentage and becomes a bar, NULL a dash.
CREATE FUNCTION redrive._report_table(p_query text, p_empty text) RETURNS xml
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_rows json;
BEGIN
    EXECUTE format('SELECT json_agg(q) FROM (%s) AS q', p_query) INTO v_rows;
    IF v_rows IS NULL THEN
        RETURN xmlelement(NAME p, xmlattributes('empty' AS class), p_empty);
    END IF;
    RETURN xmlelement(NAME div, xmlattributes('scroll' AS class, '0' AS tabindex, 'region' AS role, 'Table, can be scrolled' AS "aria-label"),
        xmlelement(NAME table,
            xmlelement(NAME thead, xmlelement(NAME tr, (
                SELECT xmlagg(xmlelement(NAME th, xmlattributes('col' AS scope, CASE json_typeof(h.value) WHEN 'number' THEN 'n' END AS class), h.key) ORDER BY h.place)
                FROM json_each(v_rows -> 0) WITH ORDINALITY AS h (key, value, place)))),
            xmlelement(NAME tbody, (
                SELECT xmlagg(xmlelement(NAME tr, (
                        SELECT xmlagg(CASE
                                WHEN json_typeof(c.value) = 'null' OR c.value #>> '{}' = '' THEN xmlelement(NAME td, '–')
                                WHEN c.key = 'progress' THEN xmlelement(NAME td,
                                    xmlelement(NAME progress, xmlattributes(100 AS max, c.value #>> '{}' AS value, 'progress' AS "aria-label"), c.value #>> '{}'),
                                    ' ' || (c.value #>> '{}') || ' %')
                                WHEN json_typeof(c.value) = 'number' THEN xmlelement(NAME td, xmlattributes('n' AS class), redrive._report_number((c.value #>> '{}')::numeric))
                                ELSE xmlelement(NAME td, xmlattributes(CASE WHEN length(c.value #>> '{}') > 30 THEN 'long' END AS class), c.value #>> '{}')
                            END ORDER BY c.place)
                        FROM json_each(r.value) WITH ORDINALITY AS c (key, value, place))) ORDER BY r.place)
                FROM json_array_elements(v_rows) WITH ORDINALITY AS r (value, place)))));
END
$$;

CREATE FUNCTION redrive._report_number(p_value numeric) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN $1 = trunc($1) THEN to_char($1, 'FM999,999,999,999,999,990') ELSE trim_scale(round($1, 3))::text END
$$;

-- Stacked columns over time, and the same numbers as a table.  p_values has a
-- row per series and a column per time, p_colours a number per series.
CREATE FUNCTION redrive._report_chart(p_title text, p_unit text, p_times timestamptz[], p_names text[], p_colours int[], p_values numeric[]) RETURNS xml
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    c_left constant numeric := 64;
    c_top constant numeric := 12;
    c_width constant numeric := 720;
    c_height constant numeric := 180;
    v_n int := cardinality(p_times);
    v_column numeric := c_width / v_n;
    v_most numeric;
    v_step numeric;
    v_scale numeric;
    v_format text := CASE WHEN p_times[v_n] - p_times[1] > interval '36 hours' THEN 'MM-DD HH24:MI' ELSE 'HH24:MI' END;
BEGIN
    SELECT max(s.sum) INTO v_most
    FROM (SELECT sum(p_values[i][j]) FROM generate_series(1, cardinality(p_names)) AS i CROSS JOIN generate_series(1, v_n) AS j GROUP BY j) AS s;
    -- about four lines at round numbers
    v_step := greatest(v_most, 1) / 4;
    SELECT min(s.step) INTO v_step
    FROM (SELECT m * 10 ^ (floor(log(v_step)) + e) AS step FROM unnest(ARRAY[1, 2, 5]) AS m CROSS JOIN generate_series(0, 1) AS e) AS s
    WHERE s.step >= v_step AND s.step >= 1;
    v_scale := c_height / (v_step * greatest(ceil(v_most / v_step), 1));
    RETURN xmlelement(NAME figure,
        xmlelement(NAME div, xmlattributes('scroll' AS class, '0' AS tabindex, 'region' AS role, 'Chart, can be scrolled' AS "aria-label"), xmlelement(NAME svg, xmlattributes('http://www.w3.org/2000/svg' AS xmlns, '0 0 800 232' AS "viewBox", 'img' AS role, p_title || ', ' || p_unit AS "aria-label"),
            (SELECT xmlagg(xmlconcat(
                    xmlelement(NAME line, xmlattributes('grid' AS class, c_left AS x1, c_left + c_width AS x2, y.at AS y1, y.at AS y2)),
                    xmlelement(NAME text, xmlattributes('end' AS "text-anchor", c_left - 6 AS x, y.at + 4 AS y), redrive._report_number(y.value))) ORDER BY y.value)
                FROM (SELECT g AS value, round(c_top + c_height - g * v_scale, 1) AS at
                    FROM generate_series(0, v_step * greatest(ceil(v_most / v_step), 1), v_step) AS g) AS y),
            (SELECT xmlagg(xmlelement(NAME text, xmlattributes('middle' AS "text-anchor", round(c_left + (j - 0.5) * v_column, 1) AS x, c_top + c_height + 18 AS y),
                    to_char(p_times[j], v_format)) ORDER BY j)
                FROM generate_series(1, v_n, greatest(ceil(v_n / 8.0)::int, 1)) AS j),
            xmlelement(NAME text, xmlattributes('start' AS "text-anchor", 0 AS x, c_top + c_height + 36 AS y), p_unit),
            (SELECT xmlagg(xmlelement(NAME rect, xmlattributes('s' || p_colours[b.i] AS class, round(c_left + (b.j - 1) * v_column + v_column * 0.1, 1) AS x,
                        round(v_column * 0.8, 1) AS width, round(c_top + c_height - (b.below + b.value) * v_scale, 1) AS y, round(b.value * v_scale, 1) AS height),
                        xmlelement(NAME title, format('%s: %s %s', to_char(p_times[b.j], v_format), redrive._report_number(b.value), p_names[b.i]))) ORDER BY b.j, b.i)
                FROM (SELECT i, j, p_values[i][j] AS value,
                        coalesce(sum(p_values[i][j]) OVER (PARTITION BY j ORDER BY i ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS below
                    FROM generate_series(1, cardinality(p_names)) AS i CROSS JOIN generate_series(1, v_n) AS j) AS b
                WHERE b.value > 0))),
        xmlelement(NAME figcaption, (
            SELECT xmlagg(xmlelement(NAME span, xmlattributes('key' AS class),
                    xmlelement(NAME span, xmlattributes('box s' || p_colours[i] AS class, 'true' AS "aria-hidden"), ' '), ' ' || p_names[i]) ORDER BY i)
            FROM generate_series(1, cardinality(p_names)) AS i)),
        xmlelement(NAME details, xmlelement(NAME summary, 'Numbers'),
            xmlelement(NAME div, xmlattributes('scroll' AS class, '0' AS tabindex, 'region' AS role, 'Numbers of the chart, can be scrolled' AS "aria-label"), xmlelement(NAME table,
                xmlelement(NAME thead, xmlelement(NAME tr, xmlelement(NAME th, xmlattributes('col' AS scope), 'from'), (
                    SELECT xmlagg(xmlelement(NAME th, xmlattributes('col' AS scope, 'n' AS class), p_names[i]) ORDER BY i) FROM generate_series(1, cardinality(p_names)) AS i))),
                xmlelement(NAME tbody, (
                    SELECT xmlagg(xmlelement(NAME tr, xmlelement(NAME td, to_char(p_times[j], 'YYYY-MM-DD HH24:MI')), (
                            SELECT xmlagg(xmlelement(NAME td, xmlattributes('n' AS class), redrive._report_number(p_values[i][j])) ORDER BY i)
                            FROM generate_series(1, cardinality(p_names)) AS i)) ORDER BY j)
                    FROM generate_series(1, v_n) AS j
                    WHERE EXISTS (SELECT FROM generate_series(1, cardinality(p_names)) AS i WHERE p_values[i][j] > 0)))))));
END
$$;

-- One part of the page.
CREATE FUNCTION redrive._report_section(p_id text, p_title text, p_note text, p_content xml) RETURNS xml
LANGUAGE sql IMMUTABLE AS $$
    SELECT xmlelement(NAME section, xmlattributes($1 AS id, $1 || '-title' AS "aria-labelledby"),
        xmlelement(NAME h2, xmlattributes($1 || '-title' AS id), $2),
        CASE WHEN $3 <> '' THEN xmlelement(NAME p, xmlattributes('note' AS class), $3) END,
        $4)
$$;

-- The charts: what ended in each of up to 48 parts of the time.
CREATE FUNCTION redrive._report_charts(p_since interval) RETURNS xml
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_bucket interval;
    v_first timestamptz;
    v_times timestamptz[];
    v_good numeric[];
    v_ignored numeric[];
    v_failed numeric[];
    v_retry numeric[];
    v_unit text;
BEGIN
    SELECT b, 'per ' || n INTO v_bucket, v_unit
    FROM (VALUES (interval '1 min', 'minute'), ('5 min', '5 minutes'), ('15 min', '15 minutes'), ('30 min', '30 minutes'), ('1 hour', 'hour'),
        ('3 hours', '3 hours'), ('6 hours', '6 hours'), ('1 day', 'day'), ('7 days', 'week'), ('30 days', '30 days'), ('365 days', '365 days')) AS x (b, n)
    WHERE b * 48 >= p_since OR b >= interval '365 days'
    ORDER BY b LIMIT 1;
    v_first := date_bin(v_bucket, now() - p_since, date_trunc('day', now()));
    SELECT array_agg(t.at ORDER BY t.at), array_agg(coalesce(e.succeeded, 0) ORDER BY t.at), array_agg(coalesce(e.ignored, 0) ORDER BY t.at),
        array_agg(coalesce(e.failed, 0) ORDER BY t.at), array_agg(coalesce(e.done - e.succeeded - e.ignored - e.failed, 0) ORDER BY t.at)
    INTO v_times, v_good, v_ignored, v_failed, v_retry
    FROM generate_series(v_first, now(), v_bucket) AS t (at)
    LEFT JOIN (
        SELECT date_bin(v_bucket, x.finished_at, date_trunc('day', now())) AS at,
            sum(x.done) AS done, sum(x.succeeded) AS succeeded, sum(x.ignored) AS ignored, sum(x.failed) AS failed
        FROM redrive._ended AS x
        WHERE x.finished_at >= v_first
        GROUP BY 1) AS e ON e.at = t.at;
    RETURN xmlconcat(
        redrive._report_section('throughput', 'Items done', 'Attempts by the time at which their chunk ended.',
            redrive._report_chart('Items done over time', 'items ' || v_unit, v_times, ARRAY['succeeded', 'ignored', 'failed', 'to be retried'], ARRAY[1, 2, 3, 4],
                ARRAY[v_good, v_ignored, v_failed, v_retry])),
        redrive._report_section('failures', 'Items that did not succeed', '',
            redrive._report_chart('Items that did not succeed over time', 'items ' || v_unit, v_times, ARRAY['ignored', 'failed', 'to be retried'], ARRAY[2, 3, 4],
                ARRAY[v_ignored, v_failed, v_retry])));
END
$$;

CREATE FUNCTION redrive.report_html(since interval DEFAULT '24 h') RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_body xml;
    v_tiles xml;
    c_style constant text := $css$
:root { color-scheme: light dark; --back: #fff; --fore: #1b1f24; --soft: #57606a; --line: #d0d7de; --card: #f6f8fa; --s1: #1a7f4b; --s2: #8a6d00; --s3: #cf222e; --s4: #0969da; --good: #1a7f4b; --bad: #b3151f; }
@media (prefers-color-scheme: dark) { :root { --back: #0d1117; --fore: #e6edf3; --soft: #9aa5b1; --line: #3d444d; --card: #161b22; --s1: #3fb374; --s2: #d2a106; --s3: #f47067; --s4: #58a6ff; --good: #3fb374; --bad: #ff8f86; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--fore); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; } .note, .empty, footer, header p { color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: .5rem; margin: 1rem 0; padding: 0; list-style: none; }
.tiles li { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .5rem .75rem; }
.tiles b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tiles .bad b { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; white-space: nowrap; }
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 14rem; max-width: 30rem; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; } .n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
progress { width: 6rem; accent-color: var(--s1); } figure { margin: 0; } svg { width: 100%; min-width: 34rem; height: auto; display: block; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } .grid { stroke: var(--line); }
.s1 { fill: var(--s1); background: var(--s1); } .s2 { fill: var(--s2); background: var(--s2); } .s3 { fill: var(--s3); background: var(--s3); } .s4 { fill: var(--s4); background: var(--s4); }
.key { margin-right: 1rem; white-space: nowrap; } .box { display: inline-block; width: .8em; height: .8em; border-radius: 2px; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
summary { cursor: pointer; color: var(--soft); margin: .5rem 0; } :focus-visible { outline: 2px solid var(--s4); }
@media print { body { max-width: none; font-size: 11px; } svg { min-width: 0; } section { break-inside: avoid-page; } details { display: none; } .scroll { overflow: visible; } }
$css$;
BEGIN
    IF since IS NULL THEN
        RAISE EXCEPTION 'since must not be null' USING ERRCODE = '22004', HINT = 'Leave the argument out for the last 24 hours.';
    ELSIF since < interval '1 min' OR since > interval '20 years' THEN
        RAISE EXCEPTION 'invalid value for "since"' USING ERRCODE = '22023', DETAIL = format('It is %s.', since), HINT = 'Give a time from 1 minute to 20 years.';
    END IF;

    SELECT xmlelement(NAME ul, xmlattributes('tiles' AS class), xmlagg(
            xmlelement(NAME li, xmlattributes(CASE WHEN t.bad AND t.value > 0 THEN 'bad' END AS class, t.id AS id), xmlelement(NAME b, redrive._report_number(t.value)), t.label) ORDER BY t.place))
    INTO v_tiles
    FROM (
        SELECT 1, 'tile-live', 'batches live', count(*), false FROM redrive.batch_progress AS b WHERE b.state NOT IN ('finished', 'cancelled')
        UNION ALL
        SELECT 2, 'tile-done', 'items done', coalesce(sum(e.done), 0), false FROM redrive._ended AS e WHERE e.finished_at >= now() - since
        UNION ALL
        SELECT 3, 'tile-failed', 'items failed', coalesce(sum(e.failed), 0), true FROM redrive._ended AS e WHERE e.finished_at >= now() - since
        UNION ALL
        SELECT 4, 'tile-waiting', 'retries waiting', coalesce(sum(q.waiting_retry), 0), false FROM redrive.queue_stats AS q
        UNION ALL
        SELECT 5, 'tile-stale', 'batches stale', count(*), true FROM redrive.stale_batches
        UNION ALL
        SELECT 6, 'tile-workers', 'workers', count(*), false FROM redrive.workers
    ) AS t (place, id, label, value, bad);

    v_body := xmlconcat(
        xmlelement(NAME header, xmlelement(NAME h1, 'pg_redrive: ' || current_database()),
            xmlelement(NAME p, format('%s to %s (%s), as %s sees it. PostgreSQL %s.', to_char(now() - since, 'YYYY-MM-DD HH24:MI'), to_char(now(), 'YYYY-MM-DD HH24:MI:SS'),
                current_setting('TimeZone'), current_user, current_setting('server_version')))),
        xmlelement(NAME main,
            v_tiles,
            redrive._report_section('batches', 'Batches now', '', redrive._report_table(
                $q$SELECT b.batch_id AS batch, b.handler, coalesce(b.label, '') AS label, b.state, b.percent_done AS progress, b.total, b.succeeded, b.ignored, b.failed, b.waiting,
                    b.items_per_second AS "items/s", b.time_left::text AS "time left"
                FROM redrive.batch_progress AS b WHERE b.state NOT IN ('finished', 'cancelled')
                ORDER BY b.state, b.priority DESC, b.batch_id LIMIT 100$q$, 'No batch is live.')),
            redrive._report_charts(since),
            redrive._report_section('groups', 'Failures in groups', 'The largest groups; sample messages are shown to the owner''s members only.', redrive._report_table(
                $q$SELECT g.handler, g.error_class AS class, g.sqlstate AS "SQLSTATE", left(g.sample_message, 300) AS "sample message", g.items, g.waiting, g.failed,
                    to_char(g.last_seen, 'YYYY-MM-DD HH24:MI') AS "last seen", g.fingerprint
                FROM redrive.failure_groups AS g ORDER BY g.items DESC, g.fingerprint, g.handler LIMIT 30$q$, 'Nothing has failed.')),
            redrive._report_section('retries', 'Retries waiting', '', redrive._report_table(
                $q$SELECT f.handler, count(*) FILTER (WHERE f.next_attempt_at <= now()) AS "due", count(*) FILTER (WHERE f.next_attempt_at > now() AND f.next_attempt_at <= now() + interval '5 min') AS "in 5 minutes",
                    count(*) FILTER (WHERE f.next_attempt_at > now() + interval '5 min' AND f.next_attempt_at <= now() + interval '1 hour') AS "in an hour",
                    count(*) FILTER (WHERE f.next_attempt_at > now() + interval '1 hour') AS "later", count(*) FILTER (WHERE f.next_attempt_at IS NULL) AS "for the pass", count(*) AS total,
                    to_char(min(f.next_attempt_at), 'YYYY-MM-DD HH24:MI:SS') AS "next"
                FROM redrive.failed_items AS f WHERE f.state = 'waiting' GROUP BY f.handler ORDER BY f.handler$q$, 'No item waits for a retry.')),
            redrive._report_section('stale', 'Stale batches', '', redrive._report_table(
                $q$SELECT s.batch_id AS batch, s.handler, s.reason, to_char(s.since, 'YYYY-MM-DD HH24:MI:SS') AS since, s.action AS "what is done"
                FROM redrive.stale_batches AS s ORDER BY s.since, s.batch_id LIMIT 100$q$, 'No batch is stale.')),
            redrive._report_section('queues', 'Handlers', '', redrive._report_table(
                $q$SELECT q.handler, q.workers, q.max_workers AS "workers at most", CASE WHEN q.paused THEN 'paused' ELSE 'on' END AS state, q.ready, q.delayed, q.in_flight AS "in flight",
                    q.waiting_retry AS "waiting for retry", q.oldest_ready_age::text AS "oldest ready"
                FROM redrive.queue_stats AS q ORDER BY q.handler$q$, 'There are no handlers.')),
            redrive._report_section('workers', 'Workers', '', redrive._report_table(
                $q$SELECT w.pid::text AS pid, w.kind, w.role, w.handler, w.batch_id::text AS batch, w.state, w.item_no AS item, date_trunc('second', now() - w.item_started_at)::text AS "in it for", w.items_per_second AS "items/s"
                FROM redrive.workers AS w ORDER BY w.kind, w.pid$q$, 'No worker runs.')),
            redrive._report_section('passes', 'Passes', 'The last run of each.', redrive._report_table(
                $q$SELECT DISTINCT ON (p.pass) p.pass, to_char(p.started_at, 'YYYY-MM-DD HH24:MI:SS') AS started, round(extract(epoch FROM p.finished_at - p.started_at) * 1000, 1) AS "ms", p.acted AS "rows", p.detail
                FROM redrive.pass_history AS p ORDER BY p.pass, p.started_at DESC$q$, 'No pass has run: see redrive.schedule_passes().')),
            CASE WHEN has_function_privilege('redrive.doctor()', 'EXECUTE') THEN
                redrive._report_section('doctor', 'Findings of doctor()', '', redrive._report_table(
                    'SELECT d.severity, d.finding, d.remedy FROM redrive.doctor() AS d', 'Nothing is wrong.')) END),
        xmlelement(NAME footer, xmlelement(NAME p, 'Made by redrive.report_html() of pg_redrive.')));

    RETURN concat('<!DOCTYPE html>', E'\n<html lang="en"><head>', CASE pg_client_encoding() WHEN 'UTF8' THEN '<meta charset="utf-8">' END,
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        xmlelement(NAME title, 'pg_redrive: ' || current_database()), '<style>', c_style, '</style></head><body>', v_body, '</body></html>');
END
$$;
COMMENT ON FUNCTION redrive.report_html IS
'One self-contained HTML page: batches, throughput and failures over the time given, failure groups, retries, stale batches, workers, passes, and what doctor() finds. It shows the caller what the views show. Write it to a file: psql -XAtc "select redrive.report_html()" > report.html. Errors: 22004 NULL, 22023 not from 1 minute to 20 years.';
-- Scheduling through pg_cron, which may be absent: nothing here names its
-- objects before they are known to be there.

CREATE TYPE redrive.scheduled_pass AS (job_name text, schedule text, command text);
COMMENT ON TYPE redrive.scheduled_pass IS 'A job of pg_cron that runs a pass';

-- The jobs, one per pass.
CREATE FUNCTION redrive._cron_jobs(p_schedule text) RETURNS SETOF redrive.scheduled_pass
LANGUAGE sql IMMUTABLE AS $$
    SELECT 'pg_redrive ' || p.pass, p.schedule, format('CALL redrive.run_pass(%L)', p.pass)
    FROM (VALUES ('rescue_stale', $1), ('retry_failed', $1), ('push_tasks', $1), ('purge', '7 * * * *')) AS p (pass, schedule)
$$;

-- Raise an error that says why pg_cron cannot be used in this database, and
-- what to do about it.
CREATE FUNCTION redrive._check_cron(p_schedule text) RETURNS void
LANGUAGE plpgsql STABLE AS $$
DECLARE
    -- defined by the preloaded library of pg_cron
    v_database text := current_setting('cron.database_name', true);
    v_here text := current_database();
    v_statements text;
BEGIN
    -- the setting alone may be a left-over line of the configuration file
    IF v_database IS NULL OR current_setting('shared_preload_libraries') !~ '[[:<:]]pg_cron[[:>:]]' THEN
        RAISE EXCEPTION 'pg_cron is not loaded' USING ERRCODE = '55000',
            DETAIL = format('shared_preload_libraries is "%s".', current_setting('shared_preload_libraries')),
            HINT = format('Put pg_cron in shared_preload_libraries, set cron.database_name = ''%s'', restart the server, and run CREATE EXTENSION pg_cron. Without pg_cron, call redrive.run_pass() from another scheduler.', v_here);
    ELSIF v_database <> v_here THEN
        SELECT string_agg(CASE WHEN p_schedule IS NULL
                THEN format('SELECT cron.unschedule(%L);', j.job_name || ' ' || v_here)
                ELSE format('SELECT cron.schedule_in_database(%L, %L, %L, %L);', j.job_name || ' ' || v_here, j.schedule, j.command, v_here) END, E'\n')
        INTO v_statements
        FROM redrive._cron_jobs(p_schedule) AS j;
        RAISE EXCEPTION 'pg_cron is in another database' USING ERRCODE = '55000',
            DETAIL = format('Its database is "%s", this one is "%s".', v_database, v_here),
            HINT = format(E'Connect to database "%s" and run:\n%s', v_database, v_statements);
    ELSIF NOT EXISTS (SELECT FROM pg_extension WHERE extname = 'pg_cron') THEN
        RAISE EXCEPTION 'extension "pg_cron" does not exist' USING ERRCODE = '55000',
            DETAIL = format('It is loaded and its database is "%s".', v_database),
            HINT = 'Run CREATE EXTENSION pg_cron, then try again.';
    END IF;
END
$$;

-- Jobs are found by name.  pg_cron keeps names apart by role: jobs of the same
-- name that another role has scheduled, and that the caller may see, are taken
-- over or removed rather than doubled.
CREATE FUNCTION redrive.schedule_passes(schedule text DEFAULT '* * * * *')
RETURNS SETOF redrive.scheduled_pass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    j record;
    v_ids bigint[];
BEGIN
    IF $1 IS NULL THEN
        RAISE EXCEPTION 'schedule must not be null' USING ERRCODE = '22004', HINT = 'Leave the argument out to run the passes each minute.';
    END IF;
    PERFORM redrive._check_cron($1);
    FOR j IN SELECT x.job_name, x.schedule, x.command FROM redrive._cron_jobs($1) AS x LOOP
        EXECUTE 'SELECT array_agg(c.jobid ORDER BY c.jobid) FROM cron.job AS c WHERE c.jobname = $1 AND c.database = current_database()'
        INTO v_ids USING j.job_name;
        IF v_ids IS NULL THEN
            EXECUTE 'SELECT cron.schedule($1, $2, $3)' USING j.job_name, j.schedule, j.command;
        ELSE
            -- schedule() would leave a job that was made inactive so
            EXECUTE 'SELECT cron.alter_job($1, schedule := $2, command := $3, username := current_user::text, active := true)' USING v_ids[1], j.schedule, j.command;
            EXECUTE 'SELECT cron.unschedule(i) FROM unnest($1) AS i' USING v_ids[2:];
        END IF;
    END LOOP;
    RETURN QUERY SELECT x.job_name, x.schedule, x.command FROM redrive._cron_jobs($1) AS x;
END
$$;
COMMENT ON FUNCTION redrive.schedule_passes IS
'Have pg_cron run the passes: rescue_stale, retry_failed and push_tasks on this schedule, purge once an hour. Can be repeated; it sets schedules back and activates jobs again. Errors: 55000 when pg_cron cannot be used from this database, the hint says what to do.';

CREATE FUNCTION redrive.unschedule_passes()
RETURNS SETOF redrive.scheduled_pass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM redrive._check_cron(NULL);
    RETURN QUERY EXECUTE
        'SELECT c.jobname::text, c.schedule, c.command
         FROM cron.job AS c
         WHERE c.database = current_database() AND c.jobname IN (SELECT x.job_name FROM redrive._cron_jobs(NULL) AS x)
         ORDER BY c.jobid';
    EXECUTE
        'SELECT cron.unschedule(c.jobid)
         FROM cron.job AS c
         WHERE c.database = current_database() AND c.jobname IN (SELECT x.job_name FROM redrive._cron_jobs(NULL) AS x)';
END
$$;
COMMENT ON FUNCTION redrive.unschedule_passes IS
'Remove the jobs of redrive.schedule_passes() from pg_cron and return what they were; none is fine. Errors: 55000 when pg_cron cannot be used from this database.';

-- Background processes that pg_cron takes: its launcher, and one for each pass
-- when it does not use connections.
CREATE FUNCTION redrive._cron_processes() RETURNS int
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN current_setting('shared_preload_libraries') !~ '[[:<:]]pg_cron[[:>:]]' THEN 0
        WHEN current_setting('cron.use_background_workers', true) = 'on' THEN 4
        ELSE 1
    END
$$;

-- For the doctor: do the passes run?  pg_cron tells about the jobs of its own
-- database only; from another one, and with another scheduler, what counts is
-- when a pass ran last.
CREATE FUNCTION redrive._doctor_passes(p_as_of timestamptz) RETURNS TABLE (severity text, finding text, remedy text)
LANGUAGE plpgsql STABLE AS $$
DECLARE
    v_trouble text;
    v_hint text;
    v_here boolean := false;
    v_ran_at timestamptz;
    v_late boolean;
    p record;
    j record;
BEGIN
    BEGIN
        PERFORM redrive._check_cron('* * * * *');
        v_here := true;
    EXCEPTION WHEN object_not_in_prerequisite_state THEN
        GET STACKED DIAGNOSTICS v_trouble = MESSAGE_TEXT, v_hint = PG_EXCEPTION_HINT;
    END;
    IF v_here AND NOT EXISTS (SELECT FROM pg_stat_activity AS a WHERE a.backend_type = 'pg_cron launcher') THEN
        RETURN QUERY VALUES ('error', 'The process "pg_cron launcher" is not there.', 'look in the server log for its errors; pg_terminate_backend() ends it until the server is restarted');
    END IF;

    FOR p IN SELECT x.job_name, x.command, substring(x.job_name FROM ' (.*)') AS pass FROM redrive._cron_jobs('* * * * *') AS x LOOP
        -- without platforms it has nothing to do
        CONTINUE WHEN p.pass = 'push_tasks' AND NOT EXISTS (SELECT FROM redrive.platforms);
        v_ran_at := (SELECT max(l.started_at) FROM redrive.pass_log AS l WHERE l.pass = p.pass);
        v_late := v_ran_at IS NULL OR v_ran_at < p_as_of - CASE p.pass WHEN 'purge' THEN interval '1 day' ELSE interval '1 hour' END;
        IF NOT v_here THEN
            IF v_late THEN
                RETURN QUERY VALUES ('warning', format('Nobody runs the pass %s. %s And %s.', p.pass, redrive._pass_runs(p.pass), v_trouble), v_hint);
            END IF;
            CONTINUE;
        END IF;
        EXECUTE 'SELECT count(*) AS jobs, count(*) FILTER (WHERE c.active) AS active, min(c.schedule) AS schedule, min(r.status) AS status,
                     min(r.return_message) AS message, min(r.start_time) AS run_at
                 FROM cron.job AS c
                 LEFT JOIN LATERAL (SELECT d.status, d.return_message, d.start_time FROM cron.job_run_details AS d
                                    WHERE d.jobid = c.jobid AND d.end_time IS NOT NULL ORDER BY d.runid DESC LIMIT 1) AS r ON true
                 WHERE c.database = current_database() AND c.command = $1'
        INTO j USING p.command;
        IF j.jobs = 0 THEN
            IF v_late THEN
                RETURN QUERY VALUES ('warning', format('The pass %s is not scheduled. %s', p.pass, redrive._pass_runs(p.pass)), 'SELECT * FROM redrive.schedule_passes();');
            END IF;
        ELSIF j.active = 0 THEN
            RETURN QUERY VALUES ('warning', format('The job %L of pg_cron is not active. %s', p.job_name, redrive._pass_runs(p.pass)), 'SELECT * FROM redrive.schedule_passes();');
        ELSIF j.status = 'failed' THEN
            RETURN QUERY VALUES ('error', format('The job %L of pg_cron failed at %s: %s', p.job_name, redrive._seconds(j.run_at), j.message),
                format('SELECT * FROM cron.job_run_details WHERE command = %L ORDER BY runid DESC;', p.command));
        ELSIF v_late AND j.run_at IS NOT NULL THEN
            RETURN QUERY VALUES ('warning', format('The pass %s is scheduled (%s), but late. %s', p.pass, j.schedule, redrive._pass_runs(p.pass)),
                format('SELECT * FROM cron.job_run_details WHERE command = %L ORDER BY runid DESC;', p.command));
        END IF;
    END LOOP;
END
$$;
-- Comments: for somebody in psql who has not read the docs.

-- Tables
COMMENT ON TABLE redrive.handlers IS 'Kinds of work: the function that does one item, its owner, its policy. Changed by create_handler(), alter_handler(), drop_handler()';
COMMENT ON COLUMN redrive.handlers.handler_id IS 'Number of the handler';
COMMENT ON COLUMN redrive.handlers.name IS 'Name that submit() and the views use';
COMMENT ON COLUMN redrive.handlers.kind IS 'How it gets its items: row, set or external';
COMMENT ON COLUMN redrive.handlers.owner IS 'Role that created it; workers run as this role, its members may use it';
COMMENT ON COLUMN redrive.handlers.function IS 'Function that does one item, by name; NULL = applications claim the items';
COMMENT ON COLUMN redrive.handlers.signature IS 'Arguments of the function; not for kind external';
COMMENT ON COLUMN redrive.handlers.max_retries IS 'Retries after the first attempt: 3 means 4 attempts';
COMMENT ON COLUMN redrive.handlers.retry_delay IS 'Time before the first retry; NULL = failures wait for the pass retry_failed';
COMMENT ON COLUMN redrive.handlers.retry_factor IS 'Each delay is the one before times this';
COMMENT ON COLUMN redrive.handlers.retry_delay_max IS 'No delay is longer';
COMMENT ON COLUMN redrive.handlers.stale_after IS 'A batch that runs without progress for this long is stale';
COMMENT ON COLUMN redrive.handlers.start_timeout IS 'A batch that is due and not started, or open and not filled, for this long is stale';
COMMENT ON COLUMN redrive.handlers.retry_window IS 'Items that still wait this long after their first failure are failed, reason expired';
COMMENT ON COLUMN redrive.handlers.item_timeout IS 'An item that runs longer is cancelled and counts as failed; NULL = no limit';
COMMENT ON COLUMN redrive.handlers.isolation IS 'chunk = many items per transaction, item = one transaction each';
COMMENT ON COLUMN redrive.handlers.commit_interval IS 'How long workers work before they commit';
COMMENT ON COLUMN redrive.handlers.max_workers IS 'At most this many workers at a time; NULL = as many as there are';
COMMENT ON COLUMN redrive.handlers.tolerated_failures IS 'A batch with more failed items is paused; NULL = never';
COMMENT ON COLUMN redrive.handlers.on_unlock IS 'Function called with the key of an item when it is unlocked';
COMMENT ON COLUMN redrive.handlers.on_finish IS 'Function called with the number of a batch and of its run when the run ends';
COMMENT ON COLUMN redrive.handlers.paused IS 'No more work is claimed, see resume_handler()';
COMMENT ON COLUMN redrive.handlers.created_at IS 'When it was created';
COMMENT ON COLUMN redrive.handlers.notify IS 'Send NOTIFY redrive_<name> when there is something to claim; only for kind external';

COMMENT ON TABLE redrive.rotation IS 'One row: where the items and failures of new batches are stored. Changed by the pass purge and set_retention()';
COMMENT ON COLUMN redrive.rotation.part IS 'Partition that new batches use';
COMMENT ON COLUMN redrive.rotation.parts IS 'Number of partitions, fixed';
COMMENT ON COLUMN redrive.rotation.retention IS 'How long ended batches are kept';
COMMENT ON COLUMN redrive.rotation.rotated_at IS 'Since when new batches use this part';

COMMENT ON TABLE redrive.batches IS 'Items submitted together for one handler. Its counters are complete only with those of chunks that are not folded: read redrive.batch_progress';
COMMENT ON COLUMN redrive.batches.batch_id IS 'Number of the batch, as submit() returned it';
COMMENT ON COLUMN redrive.batches.handler_id IS 'Handler that does its items';
COMMENT ON COLUMN redrive.batches.part IS 'Partition that holds its items and failures';
COMMENT ON COLUMN redrive.batches.state IS 'open, ready, running, paused, retrying, finished or cancelled';
COMMENT ON COLUMN redrive.batches.priority IS 'Higher is served first';
COMMENT ON COLUMN redrive.batches.run_no IS '1, and one more for each redrive or run of the pass retry_failed';
COMMENT ON COLUMN redrive.batches.total IS 'Number of items';
COMMENT ON COLUMN redrive.batches.claimed_to IS 'Items up to this number were handed to workers';
COMMENT ON COLUMN redrive.batches.succeeded IS 'Items that succeeded, in folded chunks';
COMMENT ON COLUMN redrive.batches.ignored IS 'Items that were ignored, in folded chunks';
COMMENT ON COLUMN redrive.batches.failed IS 'Items that failed for good, in folded chunks';
COMMENT ON COLUMN redrive.batches.cancelled IS 'Items that were cancelled, in folded chunks';
COMMENT ON COLUMN redrive.batches.waiting IS 'Failed items that wait for their next attempt, in folded chunks';
COMMENT ON COLUMN redrive.batches.failures_accepted IS 'Failed items when it was resumed; they do not count against tolerated_failures';
COMMENT ON COLUMN redrive.batches.keyed IS 'Some items have keys, which are locked while the items live';
COMMENT ON COLUMN redrive.batches.submitted_by IS 'Role that submitted it';
COMMENT ON COLUMN redrive.batches.run_at IS 'Not run before this time';
COMMENT ON COLUMN redrive.batches.serve_after IS 'Batches of one priority are served in this order';
COMMENT ON COLUMN redrive.batches.next_retry_at IS 'Lower bound of the next attempt of a waiting item';
COMMENT ON COLUMN redrive.batches.oldest_failure_at IS 'Lower bound of the first failure of a waiting item';
COMMENT ON COLUMN redrive.batches.items_per_second IS 'Measured rate of one worker';
COMMENT ON COLUMN redrive.batches.created_at IS 'When it was submitted or opened';
COMMENT ON COLUMN redrive.batches.sealed_at IS 'When its last item was added; NULL = still open';
COMMENT ON COLUMN redrive.batches.started_at IS 'When its first item was claimed';
COMMENT ON COLUMN redrive.batches.last_progress_at IS 'When the batch itself last changed; chunks have their own time';
COMMENT ON COLUMN redrive.batches.attempted_at IS 'When the attempts of this run ended; NULL = they go on';
COMMENT ON COLUMN redrive.batches.finished_at IS 'When nothing was left to run or retry';
COMMENT ON COLUMN redrive.batches.label IS 'Free text of the submitter';
COMMENT ON COLUMN redrive.batches.idempotency_key IS 'A second submit with this key and handler returns this batch';
COMMENT ON COLUMN redrive.batches.pause_reason IS 'Who or what paused it';
COMMENT ON COLUMN redrive.batches.claimable IS 'It has items that no worker was given yet';

COMMENT ON TABLE redrive.item_blocks IS 'Items, stored in blocks of neighbours that are never changed. Read them through redrive.items';
COMMENT ON COLUMN redrive.item_blocks.part IS 'Partition';
COMMENT ON COLUMN redrive.item_blocks.batch_id IS 'Batch of the items';
COMMENT ON COLUMN redrive.item_blocks.first_no IS 'Number of the first item';
COMMENT ON COLUMN redrive.item_blocks.items IS 'How many items';
COMMENT ON COLUMN redrive.item_blocks.bytes IS 'Size of keys and payloads, roughly';
COMMENT ON COLUMN redrive.item_blocks.keys IS 'Key of each item; NULL = none has one';
COMMENT ON COLUMN redrive.item_blocks.payloads IS 'Payload of each item';

COMMENT ON TABLE redrive.chunks IS 'Claims: a range of items, or a set of due failures, that one worker was given';
COMMENT ON COLUMN redrive.chunks.chunk_id IS 'Number of the chunk';
COMMENT ON COLUMN redrive.chunks.batch_id IS 'Batch of its items';
COMMENT ON COLUMN redrive.chunks.handler_id IS 'Handler of the batch';
COMMENT ON COLUMN redrive.chunks.part IS 'Partition of the batch';
COMMENT ON COLUMN redrive.chunks.run_no IS 'Run of the batch it belongs to';
COMMENT ON COLUMN redrive.chunks.kind IS 'first = items never attempted, retry = a list of items that failed before';
COMMENT ON COLUMN redrive.chunks.state IS 'running, done or orphaned';
COMMENT ON COLUMN redrive.chunks.from_no IS 'First item number';
COMMENT ON COLUMN redrive.chunks.to_no IS 'Last item number';
COMMENT ON COLUMN redrive.chunks.done_to IS 'Items up to this number are done and committed';
COMMENT ON COLUMN redrive.chunks.items IS 'How many items it has';
COMMENT ON COLUMN redrive.chunks.done IS 'How many of them are done';
COMMENT ON COLUMN redrive.chunks.succeeded IS 'Done items that succeeded';
COMMENT ON COLUMN redrive.chunks.ignored IS 'Done items that were ignored';
COMMENT ON COLUMN redrive.chunks.failed IS 'Done items that failed for good';
COMMENT ON COLUMN redrive.chunks.cancelled IS 'Items that were cancelled before their turn';
COMMENT ON COLUMN redrive.chunks.waiting IS 'Change to the waiting items of the batch; a retry chunk starts below zero';
COMMENT ON COLUMN redrive.chunks.folded IS 'Its counters were added to those of the batch';
COMMENT ON COLUMN redrive.chunks.lease_token IS 'Proof of the claim; changes when another worker takes over';
COMMENT ON COLUMN redrive.chunks.worker_pid IS 'Process that has the claim; NULL for an external worker';
COMMENT ON COLUMN redrive.chunks.worker_started_at IS 'When that process started: pids are used again';
COMMENT ON COLUMN redrive.chunks.rescue_count IS 'How often its worker was lost';
COMMENT ON COLUMN redrive.chunks.excused IS 'How many of these losses are explained: an item that is counted in crashes, or another process, crashed the server';
COMMENT ON COLUMN redrive.chunks.claim_done IS 'done when it was claimed last';
COMMENT ON COLUMN redrive.chunks.claimed_at IS 'When the worker got it';
COMMENT ON COLUMN redrive.chunks.progress_at IS 'Last commit of its worker';
COMMENT ON COLUMN redrive.chunks.finished_at IS 'When all of it was done';
COMMENT ON COLUMN redrive.chunks.worker IS 'Name that its external worker gave itself';
COMMENT ON COLUMN redrive.chunks.lease IS 'How long an external worker has it, unless the lease is renewed';
COMMENT ON COLUMN redrive.chunks.lease_until IS 'When the lease of its external worker ends; NULL = no such worker has it';
COMMENT ON COLUMN redrive.chunks.settled IS 'Items behind done_to that are done too; only external workers do them out of their order';

COMMENT ON TABLE redrive.retry_lists IS 'Items of the retry chunks that are not done';
COMMENT ON COLUMN redrive.retry_lists.chunk_id IS 'Chunk';
COMMENT ON COLUMN redrive.retry_lists.item_nos IS 'Its items, in their order';
COMMENT ON COLUMN redrive.retry_lists.attempts IS 'Attempts made of each';
COMMENT ON COLUMN redrive.retry_lists.free_counts IS 'Of them, those that cost no retry';
COMMENT ON COLUMN redrive.retry_lists.first_failed_at IS 'First failure of each';

COMMENT ON TABLE redrive.failures IS 'Items whose last attempt failed, with its error. Read them through redrive.failed_items';
COMMENT ON COLUMN redrive.failures.part IS 'Partition';
COMMENT ON COLUMN redrive.failures.batch_id IS 'Batch of the item';
COMMENT ON COLUMN redrive.failures.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.failures.handler_id IS 'Handler of the batch';
COMMENT ON COLUMN redrive.failures.run_no IS 'Run of the batch in which it failed last';
COMMENT ON COLUMN redrive.failures.state IS 'waiting, failed, ignored or cancelled';
COMMENT ON COLUMN redrive.failures.reason IS 'Why a failed item is not retried: exhausted, non_retryable, quarantined or expired';
COMMENT ON COLUMN redrive.failures.rule_id IS 'Classification rule that decided';
COMMENT ON COLUMN redrive.failures.error_class IS 'Class the rule gave the error';
COMMENT ON COLUMN redrive.failures.sqlstate IS 'SQLSTATE of the error, or the code that an outcome gave';
COMMENT ON COLUMN redrive.failures.fingerprint IS 'The same for errors of the same kind, whatever values they name';
COMMENT ON COLUMN redrive.failures.retry_count IS 'Retries used up, as max_retries counts them';
COMMENT ON COLUMN redrive.failures.free_count IS 'Attempts that cost no retry';
COMMENT ON COLUMN redrive.failures.attempts IS 'Attempts made';
COMMENT ON COLUMN redrive.failures.first_failed_at IS 'First failure';
COMMENT ON COLUMN redrive.failures.last_failed_at IS 'Last failure';
COMMENT ON COLUMN redrive.failures.next_attempt_at IS 'When it is due; NULL = waits for the pass retry_failed, or is final';
COMMENT ON COLUMN redrive.failures.key IS 'Key of the item';
COMMENT ON COLUMN redrive.failures.message IS 'Message of the error';
COMMENT ON COLUMN redrive.failures.detail IS 'Detail of the error';
COMMENT ON COLUMN redrive.failures.hint IS 'Hint of the error';
COMMENT ON COLUMN redrive.failures.context IS 'Where the error was raised';
COMMENT ON COLUMN redrive.failures.constraint_name IS 'Constraint that was violated';

COMMENT ON TABLE redrive.failure_log IS 'Failed attempts of items that were taken up again since. Read them through redrive.failure_attempts';
COMMENT ON COLUMN redrive.failure_log.part IS 'Partition';
COMMENT ON COLUMN redrive.failure_log.batch_id IS 'Batch of the item';
COMMENT ON COLUMN redrive.failure_log.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.failure_log.attempt IS 'Which attempt, from 1';
COMMENT ON COLUMN redrive.failure_log.run_no IS 'Run of the batch';
COMMENT ON COLUMN redrive.failure_log.failed_at IS 'When it failed';
COMMENT ON COLUMN redrive.failure_log.error_class IS 'Class of the error';
COMMENT ON COLUMN redrive.failure_log.sqlstate IS 'SQLSTATE of the error, or the code that an outcome gave';
COMMENT ON COLUMN redrive.failure_log.fingerprint IS 'The same for errors of the same kind';
COMMENT ON COLUMN redrive.failure_log.message IS 'Message of the error';
COMMENT ON COLUMN redrive.failure_log.detail IS 'Detail of the error';
COMMENT ON COLUMN redrive.failure_log.hint IS 'Hint of the error';
COMMENT ON COLUMN redrive.failure_log.context IS 'Where the error was raised';
COMMENT ON COLUMN redrive.failure_log.constraint_name IS 'Constraint that was violated';

COMMENT ON TABLE redrive.locks IS 'Keys held by live items; a key is held by one item of a handler at a time. See is_locked()';
COMMENT ON COLUMN redrive.locks.handler_id IS 'Handler of the item';
COMMENT ON COLUMN redrive.locks.key IS 'Key of the item';
COMMENT ON COLUMN redrive.locks.batch_id IS 'Batch that holds it';
COMMENT ON COLUMN redrive.locks.item_no IS 'Item that holds it';

COMMENT ON TABLE redrive.callbacks IS 'Calls of on_unlock and on_finish that a worker has still to make';
COMMENT ON COLUMN redrive.callbacks.callback_id IS 'Number of the call';
COMMENT ON COLUMN redrive.callbacks.handler_id IS 'Handler whose function is called';
COMMENT ON COLUMN redrive.callbacks.batch_id IS 'Batch it is about';
COMMENT ON COLUMN redrive.callbacks.kind IS 'on_unlock or on_finish';
COMMENT ON COLUMN redrive.callbacks.key IS 'Key that was unlocked';
COMMENT ON COLUMN redrive.callbacks.run_no IS 'Run of the batch';
COMMENT ON COLUMN redrive.callbacks.failures IS 'How often the call failed';
COMMENT ON COLUMN redrive.callbacks.next_attempt_at IS 'When it is due';
COMMENT ON COLUMN redrive.callbacks.message IS 'Error of the last try';
COMMENT ON COLUMN redrive.callbacks.crash_count IS 'How often it crashed the server; at two it is not run again';
COMMENT ON COLUMN redrive.callbacks.last_crashed_at IS 'Start of the server after the last of these crashes';
COMMENT ON COLUMN redrive.callbacks.created_at IS 'When it became necessary';

COMMENT ON TABLE redrive.canaries IS 'Last redrive with a canary of a batch: items that run first, and those held until enough of them have succeeded. See why()';
COMMENT ON COLUMN redrive.canaries.batch_id IS 'Batch';
COMMENT ON COLUMN redrive.canaries.run_no IS 'Run that it began; once decided, the run in which that was';
COMMENT ON COLUMN redrive.canaries.items IS 'Numbers of the items that run first';
COMMENT ON COLUMN redrive.canaries.needed IS 'How many of them have to succeed';
COMMENT ON COLUMN redrive.canaries.held IS 'Numbers of the items that follow them or stay failed';
COMMENT ON COLUMN redrive.canaries.decided_at IS 'When it was clear; NULL = not yet';
COMMENT ON COLUMN redrive.canaries.released IS 'How many of the held items followed; NULL = none, as too few succeeded';

COMMENT ON TABLE redrive.crashes IS 'Items that crashed the server, or may have: they run alone. Read them through redrive.crashed_items';
COMMENT ON COLUMN redrive.crashes.batch_id IS 'Batch of the item';
COMMENT ON COLUMN redrive.crashes.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.crashes.crash_count IS 'How often; 0 = only suspected; at two it is not run again';
COMMENT ON COLUMN redrive.crashes.first_crashed_at IS 'Start of the server after the first of these crashes';
COMMENT ON COLUMN redrive.crashes.last_crashed_at IS 'Start of the server after the last of these crashes';

COMMENT ON TABLE redrive.classification_rules IS 'What is done about an error. Add rules of your own with INSERT; see classify() for which one decides';
COMMENT ON COLUMN redrive.classification_rules.rule_id IS 'Number of the rule';
COMMENT ON COLUMN redrive.classification_rules.handler IS 'Only for this handler; NULL = for all';
COMMENT ON COLUMN redrive.classification_rules.priority IS 'Higher decides before lower';
COMMENT ON COLUMN redrive.classification_rules.sqlstate_pattern IS 'SQLSTATE, or its beginning and %; NULL = any';
COMMENT ON COLUMN redrive.classification_rules.constraint_name IS 'Only for this constraint; NULL = any';
COMMENT ON COLUMN redrive.classification_rules.message_pattern IS 'Regular expression for the message; NULL = any';
COMMENT ON COLUMN redrive.classification_rules.error_class IS 'Name of the class';
COMMENT ON COLUMN redrive.classification_rules.action IS 'ignore, fail, retry, retry_free or pause';
COMMENT ON COLUMN redrive.classification_rules.enabled IS 'Off = passed over';
COMMENT ON COLUMN redrive.classification_rules.builtin IS 'Came with the extension';
COMMENT ON COLUMN redrive.classification_rules.hits IS 'Failures it has decided';

COMMENT ON TABLE redrive.pass_log IS 'What the passes did. Read it through redrive.pass_history';
COMMENT ON COLUMN redrive.pass_log.pass_id IS 'Number of the call';
COMMENT ON COLUMN redrive.pass_log.pass IS 'rescue_stale, retry_failed, push_tasks or purge';
COMMENT ON COLUMN redrive.pass_log.as_of IS 'Time the pass took for now';
COMMENT ON COLUMN redrive.pass_log.started_at IS 'When it started';
COMMENT ON COLUMN redrive.pass_log.finished_at IS 'When it ended';
COMMENT ON COLUMN redrive.pass_log.acted IS 'Rows changed';
COMMENT ON COLUMN redrive.pass_log.more IS 'Work was left for another call';
COMMENT ON COLUMN redrive.pass_log.detail IS 'What was done, by kind';

-- Views
COMMENT ON VIEW redrive.batch_progress IS 'Batches with live counts: total = succeeded + ignored + failed + cancelled + waiting + running + pending';
COMMENT ON COLUMN redrive.batch_progress.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.batch_progress.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.batch_progress.label IS 'Free text of the submitter';
COMMENT ON COLUMN redrive.batch_progress.state IS 'open, ready, running, paused, retrying, finished or cancelled';
COMMENT ON COLUMN redrive.batch_progress.run_no IS '1, and one more for each redrive';
COMMENT ON COLUMN redrive.batch_progress.total IS 'Number of items';
COMMENT ON COLUMN redrive.batch_progress.succeeded IS 'Done, with what workers have done since their last commit';
COMMENT ON COLUMN redrive.batch_progress.ignored IS 'Not valid, not run again';
COMMENT ON COLUMN redrive.batch_progress.failed IS 'Failed for good';
COMMENT ON COLUMN redrive.batch_progress.cancelled IS 'Not run because the batch was cancelled';
COMMENT ON COLUMN redrive.batch_progress.waiting IS 'Failed, to be tried again';
COMMENT ON COLUMN redrive.batch_progress.running IS 'In the hands of a worker';
COMMENT ON COLUMN redrive.batch_progress.pending IS 'Not yet given to a worker';
COMMENT ON COLUMN redrive.batch_progress.percent_done IS 'Items that are final, of all';
COMMENT ON COLUMN redrive.batch_progress.items_per_second IS 'Rate of the workers now, else the average so far';
COMMENT ON COLUMN redrive.batch_progress.time_left IS 'Until all is attempted, at the mean rate of the last chunks; when that is done, until the next retry; NULL = not known';
COMMENT ON COLUMN redrive.batch_progress.created_at IS 'When it was submitted or opened';
COMMENT ON COLUMN redrive.batch_progress.started_at IS 'When its first item was claimed';
COMMENT ON COLUMN redrive.batch_progress.last_progress_at IS 'Last sign of progress';
COMMENT ON COLUMN redrive.batch_progress.finished_at IS 'When nothing was left';
COMMENT ON COLUMN redrive.batch_progress.priority IS 'Higher is served first';
COMMENT ON COLUMN redrive.batch_progress.run_at IS 'Not run before this time';
COMMENT ON COLUMN redrive.batch_progress.next_retry_at IS 'When the next waiting item is due, at the earliest';
COMMENT ON COLUMN redrive.batch_progress.pause_reason IS 'Who or what paused it; NULL in rows of others';

COMMENT ON VIEW redrive.stale_batches IS 'Batches that are stuck, and what the next pass does about it; one row per reason';
COMMENT ON COLUMN redrive.stale_batches.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.stale_batches.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.stale_batches.reason IS 'orphaned, no_progress, never_started, unsealed, unfinished: see rescue_stale(); failed_recently, overdue_retry, expired: see retry_failed()';
COMMENT ON COLUMN redrive.stale_batches.since IS 'Since when it does not move';
COMMENT ON COLUMN redrive.stale_batches.action IS 'What the pass does, or why it can do nothing';

COMMENT ON VIEW redrive.failed_items IS 'Items that did not succeed, with their last error; those that succeeded later are not shown';
COMMENT ON COLUMN redrive.failed_items.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.failed_items.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.failed_items.key IS 'Key of the item; NULL in rows of others';
COMMENT ON COLUMN redrive.failed_items.state IS 'waiting, failed, ignored or cancelled';
COMMENT ON COLUMN redrive.failed_items.reason IS 'Why a failed item is not retried: exhausted, non_retryable, quarantined or expired';
COMMENT ON COLUMN redrive.failed_items.error_class IS 'Class of the error';
COMMENT ON COLUMN redrive.failed_items.sqlstate IS 'SQLSTATE of the error, or the code that an outcome gave';
COMMENT ON COLUMN redrive.failed_items.message IS 'Message of the error; NULL in rows of others';
COMMENT ON COLUMN redrive.failed_items.detail IS 'Detail of the error; NULL in rows of others';
COMMENT ON COLUMN redrive.failed_items.hint IS 'Hint of the error; NULL in rows of others';
COMMENT ON COLUMN redrive.failed_items.context IS 'Where the error was raised; NULL in rows of others';
COMMENT ON COLUMN redrive.failed_items.constraint_name IS 'Constraint that was violated';
COMMENT ON COLUMN redrive.failed_items.fingerprint IS 'The same for errors of the same kind; redrive() takes it';
COMMENT ON COLUMN redrive.failed_items.retry_count IS 'Retries used up, as max_retries counts them';
COMMENT ON COLUMN redrive.failed_items.first_failed_at IS 'First failure';
COMMENT ON COLUMN redrive.failed_items.last_failed_at IS 'Last failure';
COMMENT ON COLUMN redrive.failed_items.next_attempt_at IS 'When it is due; NULL = waits for the pass retry_failed, or is final';
COMMENT ON COLUMN redrive.failed_items.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.failed_items.attempts IS 'Attempts made, those that cost no retry included';
COMMENT ON COLUMN redrive.failed_items.run_no IS 'Run of the batch in which it failed last';

COMMENT ON VIEW redrive.crashed_items IS 'Items whose server process died while it executed them; at a crash_count of two they are failed, reason quarantined';
COMMENT ON COLUMN redrive.crashed_items.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.crashed_items.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.crashed_items.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.crashed_items.crash_count IS 'How often it crashed the server since it was submitted or redriven';
COMMENT ON COLUMN redrive.crashed_items.first_crashed_at IS 'Start of the server after the first of these crashes';
COMMENT ON COLUMN redrive.crashed_items.last_crashed_at IS 'Start of the server after the last of these crashes';

COMMENT ON VIEW redrive.failure_attempts IS 'Every failed attempt of every item, also of those that succeeded later';
COMMENT ON COLUMN redrive.failure_attempts.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.failure_attempts.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.failure_attempts.attempt IS 'Which attempt, from 1';
COMMENT ON COLUMN redrive.failure_attempts.run_no IS 'Run of the batch';
COMMENT ON COLUMN redrive.failure_attempts.failed_at IS 'When it failed';
COMMENT ON COLUMN redrive.failure_attempts.error_class IS 'Class of the error';
COMMENT ON COLUMN redrive.failure_attempts.sqlstate IS 'SQLSTATE of the error, or the code that an outcome gave';
COMMENT ON COLUMN redrive.failure_attempts.message IS 'Message of the error; NULL in rows of others';
COMMENT ON COLUMN redrive.failure_attempts.detail IS 'Detail of the error; NULL in rows of others';
COMMENT ON COLUMN redrive.failure_attempts.hint IS 'Hint of the error; NULL in rows of others';
COMMENT ON COLUMN redrive.failure_attempts.context IS 'Where the error was raised; NULL in rows of others';
COMMENT ON COLUMN redrive.failure_attempts.constraint_name IS 'Constraint that was violated';
COMMENT ON COLUMN redrive.failure_attempts.fingerprint IS 'The same for errors of the same kind';

COMMENT ON VIEW redrive.failure_groups IS 'Failed items grouped by kind of error; redrive(batch_id, fingerprint) runs one group again';
COMMENT ON COLUMN redrive.failure_groups.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.failure_groups.fingerprint IS 'Kind of error';
COMMENT ON COLUMN redrive.failure_groups.error_class IS 'Class of the error';
COMMENT ON COLUMN redrive.failure_groups.sqlstate IS 'SQLSTATE of the error, or the code that an outcome gave';
COMMENT ON COLUMN redrive.failure_groups.sample_message IS 'Message of one of them; NULL in rows of others';
COMMENT ON COLUMN redrive.failure_groups.items IS 'Items that did not succeed';
COMMENT ON COLUMN redrive.failure_groups.waiting IS 'Of them, to be tried again';
COMMENT ON COLUMN redrive.failure_groups.failed IS 'Of them, failed for good';
COMMENT ON COLUMN redrive.failure_groups.first_seen IS 'First failure';
COMMENT ON COLUMN redrive.failure_groups.last_seen IS 'Last failure';

COMMENT ON VIEW redrive.item_status IS 'State of each item, derived: nothing is stored for items that succeed. Ask for one batch_id';
COMMENT ON COLUMN redrive.item_status.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.item_status.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.item_status.key IS 'Key of the item; NULL in rows of others';
COMMENT ON COLUMN redrive.item_status.state IS 'succeeded, ignored, failed, cancelled, waiting, running or pending; the items of a chunk that runs are running until their commit';

COMMENT ON VIEW redrive.items IS 'Items as they were submitted, of handlers whose owner''s rights you have. Ask for one batch_id';
COMMENT ON COLUMN redrive.items.part IS 'Partition that holds it';
COMMENT ON COLUMN redrive.items.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.items.item_no IS 'Number of the item in its batch';
COMMENT ON COLUMN redrive.items.key IS 'Key of the item';
COMMENT ON COLUMN redrive.items.payload IS 'What the handler gets';

COMMENT ON VIEW redrive.queue_stats IS 'Work per handler, in items';
COMMENT ON COLUMN redrive.queue_stats.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.queue_stats.workers IS 'Workers that have a claim';
COMMENT ON COLUMN redrive.queue_stats.ready IS 'Would run now if a worker were free';
COMMENT ON COLUMN redrive.queue_stats.delayed IS 'Not to run yet: run_at is ahead, or the batch is open or paused';
COMMENT ON COLUMN redrive.queue_stats.in_flight IS 'In the hands of workers';
COMMENT ON COLUMN redrive.queue_stats.waiting_retry IS 'Failed, to be tried again';
COMMENT ON COLUMN redrive.queue_stats.oldest_ready_age IS 'How long the oldest batch with ready items has been due';
COMMENT ON COLUMN redrive.queue_stats.max_workers IS 'Limit of the handler; NULL = none';
COMMENT ON COLUMN redrive.queue_stats.paused IS 'The handler is paused, see resume_handler()';

COMMENT ON VIEW redrive.workers IS 'Processes that work for pg_redrive, live, and the claims of external workers';
COMMENT ON COLUMN redrive.workers.pid IS 'Process, as in pg_stat_activity; NULL for an external worker';
COMMENT ON COLUMN redrive.workers.kind IS 'executor, foreground = CALL redrive.work(), or external = a claim of an application';
COMMENT ON COLUMN redrive.workers.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.workers.batch_id IS 'Number of the batch';
COMMENT ON COLUMN redrive.workers.chunk_id IS 'Claim it works on';
COMMENT ON COLUMN redrive.workers.state IS 'idle, claiming, running or callbacks';
COMMENT ON COLUMN redrive.workers.item_no IS 'Item it is in, of a set handler the first of the call; NULL = in none';
COMMENT ON COLUMN redrive.workers.item_started_at IS 'Since when it is in it';
COMMENT ON COLUMN redrive.workers.open_succeeded IS 'Items done since its last commit';
COMMENT ON COLUMN redrive.workers.open_failed IS 'Items that failed since its last commit';
COMMENT ON COLUMN redrive.workers.items_per_second IS 'Rate in this claim';
COMMENT ON COLUMN redrive.workers.claimed_at IS 'Since when it has the claim';
COMMENT ON COLUMN redrive.workers.role IS 'Role it runs as';
COMMENT ON COLUMN redrive.workers.started_at IS 'When the process started';
COMMENT ON COLUMN redrive.workers.worker IS 'Name that an external worker gave itself';
COMMENT ON COLUMN redrive.workers.lease_until IS 'When the lease of an external worker ends, unless it is renewed';

COMMENT ON VIEW redrive.pass_history IS 'What the passes did, as far back as the retention reaches';
COMMENT ON COLUMN redrive.pass_history.pass IS 'rescue_stale, retry_failed, push_tasks or purge';
COMMENT ON COLUMN redrive.pass_history.as_of IS 'Time the pass took for now';
COMMENT ON COLUMN redrive.pass_history.started_at IS 'When it started';
COMMENT ON COLUMN redrive.pass_history.finished_at IS 'When it ended';
COMMENT ON COLUMN redrive.pass_history.acted IS 'Rows changed';
COMMENT ON COLUMN redrive.pass_history.more IS 'Work was left for another call';
COMMENT ON COLUMN redrive.pass_history.detail IS 'What was done, by kind; NULL = there was nothing to do';

COMMENT ON VIEW redrive.throughput IS 'Items done per minute and handler in the last six hours, by the time their chunk ended';
COMMENT ON COLUMN redrive.throughput.minute IS 'Minute in which the chunks ended';
COMMENT ON COLUMN redrive.throughput.handler IS 'Name of the handler';
COMMENT ON COLUMN redrive.throughput.items IS 'Items done';
COMMENT ON COLUMN redrive.throughput.succeeded IS 'Of them, succeeded';
COMMENT ON COLUMN redrive.throughput.ignored IS 'Of them, ignored';
COMMENT ON COLUMN redrive.throughput.failed IS 'Of them, failed for good';
COMMENT ON COLUMN redrive.throughput.to_retry IS 'Of them, to be tried again';
COMMENT ON COLUMN redrive.throughput.items_per_second IS 'Items per second of this minute';

COMMENT ON VIEW redrive._live IS 'Live batches and when each has to be looked at for being stale';
COMMENT ON VIEW redrive._batches IS 'Batches with their counters as committed, chunks that are not folded included';
COMMENT ON VIEW redrive._running_chunks IS 'Claims with the life signs of their workers';
COMMENT ON VIEW redrive._stale IS 'Reasons a batch may be stale for and the times from which they hold; read through stale_batches_at()';
COMMENT ON VIEW redrive._unfolded IS 'What chunks that are not folded add to the counters of their batch';
COMMENT ON VIEW redrive._up IS 'Since when this server takes writes';
COMMENT ON VIEW redrive._verify IS 'Checks behind verify()';
COMMENT ON VIEW redrive._visible IS 'Handlers whose rows the current user may see';

-- Sequences
COMMENT ON SEQUENCE redrive.batches_batch_id_seq IS 'Numbers of batches';
COMMENT ON SEQUENCE redrive.callbacks_callback_id_seq IS 'Numbers of callbacks';
COMMENT ON SEQUENCE redrive.chunks_chunk_id_seq IS 'Numbers of chunks';
COMMENT ON SEQUENCE redrive.classification_rules_rule_id_seq IS 'Numbers of rules';
COMMENT ON SEQUENCE redrive.handlers_handler_id_seq IS 'Numbers of handlers';
COMMENT ON SEQUENCE redrive.lease_tokens IS 'Lease tokens: a new one for each claim';
COMMENT ON SEQUENCE redrive.pass_log_pass_id_seq IS 'Numbers of passes';

-- Functions that are not for users
COMMENT ON FUNCTION redrive._act IS 'Act on all batches that are stale for given reasons';
COMMENT ON FUNCTION redrive._alter_handler IS 'Body of alter_handler()';
COMMENT ON FUNCTION redrive._bad_policy IS 'Raise the error for a violated check of handlers';
COMMENT ON FUNCTION redrive._cancel IS 'Cancel a live batch whose row is locked';
COMMENT ON FUNCTION redrive._cancel_batch IS 'Body of cancel_batch()';
COMMENT ON FUNCTION redrive._candidates IS 'Best candidate of each handler and kind of work, for workers of the server';
COMMENT ON FUNCTION redrive._check_lease IS 'Raise an error unless this can be a lease';
COMMENT ON FUNCTION redrive._check_cron IS 'Raise an error when pg_cron cannot be used from this database';
COMMENT ON FUNCTION redrive._check_member IS 'Raise an error unless a role has the rights of an owner';
COMMENT ON FUNCTION redrive._chunk_size IS 'How many items a chunk gets';
COMMENT ON FUNCTION redrive._crumbs IS 'What was executed in this database when the server crashed, until it is recorded';
COMMENT ON FUNCTION redrive._suspect IS 'Have items run alone: one of them may have crashed the server';
COMMENT ON FUNCTION redrive._blame IS 'Count the items and callbacks that crashed the server';
COMMENT ON FUNCTION redrive._claim IS 'Take one chunk for a worker';
COMMENT ON FUNCTION redrive._claim_external IS 'One attempt of an external worker to claim';
COMMENT ON FUNCTION redrive._claim_of IS 'The chunk that an external worker has claimed; raise an error unless it has';
COMMENT ON FUNCTION redrive._carve IS 'Carve the next range of items off a locked batch, as a chunk';
COMMENT ON FUNCTION redrive._classify(text, text, text, text) IS 'Rule that decides about an error';
COMMENT ON FUNCTION redrive._classify(oid, text, text, text, text) IS 'Implementation of classify()';
COMMENT ON FUNCTION redrive._create_handler IS 'Body of create_handler()';
COMMENT ON FUNCTION redrive._cron_jobs IS 'Jobs that schedule_passes() makes';
COMMENT ON FUNCTION redrive._drop_handler IS 'Body of drop_handler()';
COMMENT ON FUNCTION redrive._end_waiting IS 'Make waiting failures final and unlock their keys';
COMMENT ON FUNCTION redrive._fold IS 'Add the ended chunks of a batch to its counters and move it on';
COMMENT ON FUNCTION redrive._give_back IS 'Give a claim back, or end it when its batch was cancelled';
COMMENT ON FUNCTION redrive._give_back_lost IS 'Give back the claims of lost workers, each on its own';
COMMENT ON FUNCTION redrive._handler IS 'Handler of a name, if the caller may use it';
COMMENT ON FUNCTION redrive._is_locked IS 'Body of is_locked()';
COMMENT ON FUNCTION redrive._retry_size IS 'How many items a retry chunk gets';
COMMENT ON FUNCTION redrive._take_up IS 'Take failures up again: their rows go to the log, the items to a new chunk';
COMMENT ON FUNCTION redrive._cancel_chunk IS 'Cancel what is left of a chunk and unlock its keys';
COMMENT ON FUNCTION redrive._put_back IS 'Make cancelled failures of the items of a retry chunk that were not run again';
COMMENT ON VIEW redrive._retrying IS 'Items that are being run again';
COMMENT ON COLUMN redrive._retrying.part IS 'Partition';
COMMENT ON COLUMN redrive._retrying.batch_id IS 'Batch';
COMMENT ON COLUMN redrive._retrying.chunk_id IS 'Chunk that has the item';
COMMENT ON COLUMN redrive._retrying.item_no IS 'Number of the item in its batch';
COMMENT ON FUNCTION redrive._items IS 'Items of a range, reading only the blocks they are in';
COMMENT ON FUNCTION redrive._lock_batch IS 'Lock a batch that the caller may use';
COMMENT ON FUNCTION redrive._next_due IS 'When the next work becomes due';
COMMENT ON FUNCTION redrive._orphan_lost IS 'Give back the claims of all workers that are gone, or whose lease has ended';
COMMENT ON FUNCTION redrive._part_bytes IS 'Size of the partitions of a part';
COMMENT ON FUNCTION redrive._part_state IS 'Whether a part is empty, old or to be kept';
COMMENT ON FUNCTION redrive._lock_pass IS 'Lock a pass, out of reach of pg_advisory_lock()';
COMMENT ON FUNCTION redrive._pass IS 'Frame of every pass: switch, lock, time budget, history';
COMMENT ON FUNCTION redrive._pause IS 'Pause a live batch';
COMMENT ON FUNCTION redrive._pause_batch IS 'Body of pause_batch()';
COMMENT ON FUNCTION redrive._pause_handler IS 'Body of pause_handler()';
COMMENT ON FUNCTION redrive._preloaded IS 'Whether the library is in shared_preload_libraries';
COMMENT ON FUNCTION redrive._purge IS 'Body of the pass purge';
COMMENT ON FUNCTION redrive._purge_batches IS 'Delete ended batches of an old part';
COMMENT ON FUNCTION redrive._put_right IS 'What a pass does about one stale batch';
COMMENT ON FUNCTION redrive._put_right_all IS 'The same for several batches, each on its own';
COMMENT ON FUNCTION redrive._redrive IS 'Body of redrive()';
COMMENT ON FUNCTION redrive._rescue_stale IS 'Body of the pass rescue_stale';
COMMENT ON FUNCTION redrive._resume_batch IS 'Body of resume_batch()';
COMMENT ON FUNCTION redrive._resume_handler IS 'Body of resume_handler()';
COMMENT ON FUNCTION redrive._retry_failed IS 'Body of the pass retry_failed';
COMMENT ON FUNCTION redrive._seal_batch IS 'Body of seal_batch()';
COMMENT ON FUNCTION redrive._slots IS 'Worker slots of this database in shared memory';
COMMENT ON FUNCTION redrive._truncate_part IS 'Truncate the partitions of a part without batches';
COMMENT ON FUNCTION redrive._fold_ended IS 'Fold ended chunks that nobody folded';
COMMENT ON FUNCTION redrive._unlock_keys IS 'Unlock keys of a batch and leave on_unlock to a worker';
COMMENT ON FUNCTION redrive._unlock_range IS 'Unlock the keys of items that became final outside of a worker';
COMMENT ON FUNCTION redrive._wake IS 'Wake the workers of a role at commit';
COMMENT ON FUNCTION redrive._blockers IS 'Who keeps a process waiting for a lock, as far as a role may know';
COMMENT ON FUNCTION redrive._cron_processes IS 'Background processes that pg_cron takes';
COMMENT ON FUNCTION redrive._doctor IS 'Body of doctor()';
COMMENT ON FUNCTION redrive._doctor_at IS 'What doctor() finds, or will find at another time';
COMMENT ON FUNCTION redrive._doctor_handlers IS 'For the doctor: handlers that cannot run, and settings of their owners';
COMMENT ON FUNCTION redrive._doctor_passes IS 'For the doctor: whether the passes run';
COMMENT ON FUNCTION redrive._doctor_rows IS 'For the doctor: rows that point nowhere, and stale batches';
COMMENT ON FUNCTION redrive._doctor_server IS 'For the doctor: what hinders vacuum, and the clock';
COMMENT ON FUNCTION redrive._doctor_settings IS 'For the doctor: settings, versions and processes';
COMMENT ON FUNCTION redrive._handler_problems IS 'What keeps a handler from running, whatever the batch';
COMMENT ON FUNCTION redrive._is_monitor IS 'Whether a role may see counts of all batches';
COMMENT ON FUNCTION redrive._library_version IS 'Version of the library that is loaded';
COMMENT ON FUNCTION redrive._pass_runs IS 'When a pass ran last, as a sentence';
COMMENT ON FUNCTION redrive._processes IS 'Background processes that serve this database';
COMMENT ON FUNCTION redrive._seconds IS 'A time as text, in whole seconds';
COMMENT ON FUNCTION redrive._why IS 'Body of why()';
COMMENT ON FUNCTION redrive._why_not_taken IS 'Why nobody takes what a batch has due';
COMMENT ON FUNCTION redrive._why_waits IS 'What a batch waits for by itself';
COMMENT ON FUNCTION redrive._why_workers IS 'Workers of a batch, what they are in, and who blocks them';
COMMENT ON FUNCTION redrive._canary IS 'How many canary items of a batch succeeded, and how many may yet';
COMMENT ON FUNCTION redrive._judge_canary IS 'Let the held items of a redrive follow its canary, or not';
COMMENT ON FUNCTION redrive._run_again IS 'Take failed items of a batch up again';
COMMENT ON FUNCTION redrive._wake_supervisor IS 'Let the supervisor see at commit when the next work is due';
COMMENT ON FUNCTION redrive._wake_supervisor_by IS 'The same if it would sleep longer than to this time';
COMMENT ON FUNCTION redrive._why_not_claimed IS 'Why no application claims what a batch of an external handler has due';
COMMENT ON FUNCTION redrive._work IS 'Best candidate of each kind of work of a handler';
COMMENT ON FUNCTION redrive._heartbeat IS 'Body of heartbeat()';
COMMENT ON FUNCTION redrive._lock_soon IS 'Wait a moment for the lock of a batch that others claim of';
COMMENT ON FUNCTION redrive._next_lease IS 'When the next lease of an external worker ends';
COMMENT ON FUNCTION redrive._notify IS 'Tell listeners of a handler at commit that there is something to claim';
COMMENT ON FUNCTION redrive._open_items IS 'Items of an external claim that are not settled';
COMMENT ON FUNCTION redrive._open_ranges IS 'Numbers of a chunk that are not done';
COMMENT ON FUNCTION redrive._quarantine IS 'Fail an item that was lost with its external worker too often';
COMMENT ON FUNCTION redrive._refuse_claim IS 'Raise the error for a claim that is not the caller''s';
COMMENT ON FUNCTION redrive._release IS 'Body of release()';
COMMENT ON FUNCTION redrive._split IS 'Split an orphaned chunk that is too much for an external worker';
COMMENT ON FUNCTION redrive._take_work IS 'Take some work of a handler for an external worker';
COMMENT ON FUNCTION redrive._unlock_settled IS 'Unlock the keys of items that an external worker settled';

COMMENT ON VIEW redrive._ended IS 'Chunks that have ended, with their counts';
COMMENT ON FUNCTION redrive._report_table IS 'The rows of a query as a table of the report';
COMMENT ON FUNCTION redrive._report_number IS 'A number as people read it';
COMMENT ON FUNCTION redrive._report_chart IS 'Stacked columns over time as SVG, with the same numbers as a table';
COMMENT ON FUNCTION redrive._report_section IS 'One part of the report';
COMMENT ON FUNCTION redrive._report_charts IS 'The charts of the report: items over time';

-- the task centre
COMMENT ON COLUMN redrive.platforms.platform_id IS 'Number of the platform';
COMMENT ON COLUMN redrive.platforms.name IS 'Name that the views use';
COMMENT ON COLUMN redrive.platforms.owner IS 'Role whose tasks are pushed there';
COMMENT ON COLUMN redrive.platforms.url IS 'Address of requests';
COMMENT ON COLUMN redrive.platforms.method IS 'Method of requests';
COMMENT ON COLUMN redrive.platforms.headers IS 'Headers of requests; no secrets';
COMMENT ON COLUMN redrive.platforms.build IS 'Function that makes the body; NULL = the task as JSON';
COMMENT ON COLUMN redrive.platforms.success_when IS 'Path that must be true of the answer; NULL = any 2xx is a success';
COMMENT ON COLUMN redrive.platforms.max_retries IS 'Retries after the first attempt';
COMMENT ON COLUMN redrive.platforms.retry_interval IS 'Time before the first retry';
COMMENT ON COLUMN redrive.platforms.retry_factor IS 'Each further one takes so many times as long';
COMMENT ON COLUMN redrive.platforms.retry_delay_max IS 'But never longer than this';
COMMENT ON COLUMN redrive.platforms.permanent_status IS 'Statuses that are not retried';
COMMENT ON COLUMN redrive.platforms.push_window IS 'Tasks that changed longer ago are left alone';
COMMENT ON COLUMN redrive.platforms.timeout IS 'Of one request';
COMMENT ON COLUMN redrive.platforms.connect_timeout IS 'Of its connection';
COMMENT ON COLUMN redrive.platforms.lease IS 'After which a push of which nothing is known is tried again';
COMMENT ON COLUMN redrive.platforms.max_in_flight IS 'Requests at once';
COMMENT ON COLUMN redrive.platforms.rate_limit IS 'Requests per second; NULL = any';
COMMENT ON COLUMN redrive.platforms.allow_http IS 'Is http allowed, without TLS?';
COMMENT ON COLUMN redrive.platforms.allow_cidr IS 'Private ranges that may be reached';
COMMENT ON COLUMN redrive.platforms.paused IS 'Is nothing sent at the moment?';
COMMENT ON COLUMN redrive.platforms.config_version IS 'Raised by each change; the pusher reads the platform again';
COMMENT ON COLUMN redrive.platforms.needs_plan IS 'Does the pass have to look for tasks that were never pushed there?';
COMMENT ON COLUMN redrive.platforms.secrets IS 'Kinds of secrets that were set';
COMMENT ON COLUMN redrive.platforms.created_at IS 'When it was created';
COMMENT ON COLUMN redrive.platform_secrets.platform_id IS 'Platform it is for';
COMMENT ON COLUMN redrive.platform_secrets.kind IS 'Kind of secret';
COMMENT ON COLUMN redrive.platform_secrets.secret IS 'The secret';
COMMENT ON COLUMN redrive.platform_secrets.set_at IS 'When it was set';
COMMENT ON COLUMN redrive.platform_states.platform_id IS 'Platform it is about';
COMMENT ON COLUMN redrive.platform_states.breaker IS 'State of the circuit breaker';
COMMENT ON COLUMN redrive.platform_states.reason IS 'Why it is not closed';
COMMENT ON COLUMN redrive.platform_states.opened_at IS 'When it opened';
COMMENT ON COLUMN redrive.platform_states.blocked_until IS 'When probes may be sent';
COMMENT ON COLUMN redrive.platform_states.times_opened IS 'How often it opened in a row';
COMMENT ON COLUMN redrive.platform_states.failures_in_row IS 'Attempts in a row that failed hard';
COMMENT ON COLUMN redrive.platform_states.successes_in_row IS 'Attempts in a row that succeeded';
COMMENT ON COLUMN redrive.platform_states.window_started_at IS 'Begin of the window that the rate of failures is taken from';
COMMENT ON COLUMN redrive.platform_states.window_attempts IS 'Attempts in it';
COMMENT ON COLUMN redrive.platform_states.window_failures IS 'Of them failed';
COMMENT ON COLUMN redrive.platform_states.in_flight_limit IS 'Requests at once at the moment: grows with successes';
COMMENT ON COLUMN redrive.platform_states.delivered IS 'Pushes delivered';
COMMENT ON COLUMN redrive.platform_states.attempts IS 'Attempts made';
COMMENT ON COLUMN redrive.platform_states.last_delivered_at IS 'Last delivery';
COMMENT ON COLUMN redrive.platform_states.last_failed_at IS 'Last failed attempt';
COMMENT ON COLUMN redrive.tasks.task_id IS 'Number of the task';
COMMENT ON COLUMN redrive.tasks.owner IS 'Role that recorded it, or that owns its table';
COMMENT ON COLUMN redrive.tasks.task_key IS 'Key that the application gave it';
COMMENT ON COLUMN redrive.tasks.process IS 'What it is part of';
COMMENT ON COLUMN redrive.tasks.status IS 'Its status';
COMMENT ON COLUMN redrive.tasks.version IS 'Raised by each change of the status';
COMMENT ON COLUMN redrive.tasks.payload IS 'What else is known of it';
COMMENT ON COLUMN redrive.tasks.is_test IS 'Tests are not pushed';
COMMENT ON COLUMN redrive.tasks.created_at IS 'When it was recorded first';
COMMENT ON COLUMN redrive.tasks.changed_at IS 'When its status changed last';
COMMENT ON COLUMN redrive.pushes.push_id IS 'Number of the push';
COMMENT ON COLUMN redrive.pushes.task_id IS 'The task';
COMMENT ON COLUMN redrive.pushes.platform_id IS 'The platform';
COMMENT ON COLUMN redrive.pushes.push_key IS 'With the version it makes the webhook-id';
COMMENT ON COLUMN redrive.pushes.state IS 'State of the push';
COMMENT ON COLUMN redrive.pushes.wanted_version IS 'Version that has to arrive';
COMMENT ON COLUMN redrive.pushes.wanted_status IS 'Its status';
COMMENT ON COLUMN redrive.pushes.pushed_version IS 'Version that has arrived';
COMMENT ON COLUMN redrive.pushes.pushed_status IS 'Its status';
COMMENT ON COLUMN redrive.pushes.retry_count IS 'Retries that were used up';
COMMENT ON COLUMN redrive.pushes.free_count IS 'Attempts that cost none';
COMMENT ON COLUMN redrive.pushes.attempt_no IS 'Number of the last attempt, and the fence of its record';
COMMENT ON COLUMN redrive.pushes.next_attempt_at IS 'When it is due';
COMMENT ON COLUMN redrive.pushes.lease_until IS 'When the attempt that is under way is given up';
COMMENT ON COLUMN redrive.pushes.lease_owner IS 'Pusher that has it';
COMMENT ON COLUMN redrive.pushes.sent_version IS 'Version of the last attempt';
COMMENT ON COLUMN redrive.pushes.is_probe IS 'Was it a probe of a breaker?';
COMMENT ON COLUMN redrive.pushes.failed_at IS 'Last failed attempt';
COMMENT ON COLUMN redrive.pushes.delivered_at IS 'Last delivery';
COMMENT ON COLUMN redrive.pushes.http_status IS 'Status of the last answer';
COMMENT ON COLUMN redrive.pushes.error_class IS 'Class of the last failure';
COMMENT ON COLUMN redrive.pushes.message IS 'What went wrong, in words';
COMMENT ON COLUMN redrive.pushes.created_at IS 'When it was planned';
COMMENT ON COLUMN redrive.pushes.awaits_build IS 'Has the build function of the platform still to make the body of the wanted version?';
COMMENT ON COLUMN redrive.push_bodies.push_id IS 'The push';
COMMENT ON COLUMN redrive.push_bodies.version IS 'Version of the task it was made of';
COMMENT ON COLUMN redrive.push_bodies.body IS 'The body';
COMMENT ON COLUMN redrive.push_bodies.built_at IS 'When it was made';
COMMENT ON COLUMN redrive.push_log.part IS 'Part of the rotation';
COMMENT ON COLUMN redrive.push_log.push_id IS 'The push';
COMMENT ON COLUMN redrive.push_log.attempt_no IS 'Number of the attempt';
COMMENT ON COLUMN redrive.push_log.platform_id IS 'The platform';
COMMENT ON COLUMN redrive.push_log.version IS 'Version that was sent';
COMMENT ON COLUMN redrive.push_log.started_at IS 'When it was claimed';
COMMENT ON COLUMN redrive.push_log.finished_at IS 'When it ended';
COMMENT ON COLUMN redrive.push_log.delivered IS 'Was it a success?';
COMMENT ON COLUMN redrive.push_log.charged IS 'Did it cost a retry?';
COMMENT ON COLUMN redrive.push_log.is_probe IS 'Was it a probe of a breaker?';
COMMENT ON COLUMN redrive.push_log.error_class IS 'Class of the failure';
COMMENT ON COLUMN redrive.push_log.http_status IS 'Status of the answer';
COMMENT ON COLUMN redrive.push_log.curl_code IS 'Error number of libcurl';
COMMENT ON COLUMN redrive.push_log.message IS 'What went wrong, in words';
COMMENT ON COLUMN redrive.push_log.response IS 'Begin of the answer';
COMMENT ON COLUMN redrive.http_log.http_log_id IS 'Number of the call';
COMMENT ON COLUMN redrive.http_log.requested_at IS 'When it began';
COMMENT ON COLUMN redrive.http_log.requested_by IS 'Role that called';
COMMENT ON COLUMN redrive.http_log.method IS 'Method';
COMMENT ON COLUMN redrive.http_log.host IS 'Host it went to';
COMMENT ON COLUMN redrive.http_log.ok IS 'Was the answer 2xx?';
COMMENT ON COLUMN redrive.http_log.http_status IS 'Status of the last answer';
COMMENT ON COLUMN redrive.http_log.attempts IS 'Attempts made';
COMMENT ON COLUMN redrive.http_log.milliseconds IS 'How long it took';
COMMENT ON COLUMN redrive.http_log.error IS 'Why it failed';
COMMENT ON VIEW redrive.task_status IS 'Tasks of the caller and of roles whose rights it has';
COMMENT ON COLUMN redrive.task_status.task_key IS 'Key of the task';
COMMENT ON COLUMN redrive.task_status.process IS 'What it is part of';
COMMENT ON COLUMN redrive.task_status.status IS 'Its status';
COMMENT ON COLUMN redrive.task_status.version IS 'Raised by each change of the status';
COMMENT ON COLUMN redrive.task_status.is_test IS 'Tests are not pushed';
COMMENT ON COLUMN redrive.task_status.created_at IS 'When it was recorded first';
COMMENT ON COLUMN redrive.task_status.changed_at IS 'When its status changed last';
COMMENT ON COLUMN redrive.task_status.payload IS 'What else is known of it';
COMMENT ON COLUMN redrive.task_status.owner IS 'Role it belongs to';
COMMENT ON VIEW redrive.push_status IS 'What was pushed where, and what is still to be: a row per task and platform';
COMMENT ON COLUMN redrive.push_status.task_key IS 'Key of the task';
COMMENT ON COLUMN redrive.push_status.platform IS 'Name of the platform';
COMMENT ON COLUMN redrive.push_status.state IS 'State of the push';
COMMENT ON COLUMN redrive.push_status.wanted_status IS 'Status that has to arrive';
COMMENT ON COLUMN redrive.push_status.pushed_status IS 'Status that has arrived';
COMMENT ON COLUMN redrive.push_status.retry_count IS 'Retries that were used up';
COMMENT ON COLUMN redrive.push_status.next_attempt_at IS 'When it is due';
COMMENT ON COLUMN redrive.push_status.failed_at IS 'Last failed attempt';
COMMENT ON COLUMN redrive.push_status.http_status IS 'Status of the last answer';
COMMENT ON COLUMN redrive.push_status.message IS 'What went wrong, in words';
COMMENT ON COLUMN redrive.push_status.error_class IS 'Class of the last failure';
COMMENT ON COLUMN redrive.push_status.wanted_version IS 'Version that has to arrive';
COMMENT ON COLUMN redrive.push_status.pushed_version IS 'Version that has arrived';
COMMENT ON COLUMN redrive.push_status.attempts IS 'Attempts made';
COMMENT ON COLUMN redrive.push_status.delivered_at IS 'Last delivery';
COMMENT ON COLUMN redrive.push_status.lease_until IS 'When the attempt that is under way is given up';
COMMENT ON VIEW redrive.push_attempts IS 'Attempts to push, a row for each';
COMMENT ON COLUMN redrive.push_attempts.task_key IS 'Key of the task';
COMMENT ON COLUMN redrive.push_attempts.platform IS 'Name of the platform';
COMMENT ON COLUMN redrive.push_attempts.attempt_no IS 'Number of the attempt';
COMMENT ON COLUMN redrive.push_attempts.version IS 'Version that was sent';
COMMENT ON COLUMN redrive.push_attempts.started_at IS 'When it was claimed';
COMMENT ON COLUMN redrive.push_attempts.finished_at IS 'When it ended';
COMMENT ON COLUMN redrive.push_attempts.delivered IS 'Was it a success?';
COMMENT ON COLUMN redrive.push_attempts.charged IS 'Did it cost a retry?';
COMMENT ON COLUMN redrive.push_attempts.is_probe IS 'Was it a probe of a breaker?';
COMMENT ON COLUMN redrive.push_attempts.error_class IS 'Class of the failure';
COMMENT ON COLUMN redrive.push_attempts.http_status IS 'Status of the answer';
COMMENT ON COLUMN redrive.push_attempts.curl_code IS 'Error number of libcurl';
COMMENT ON COLUMN redrive.push_attempts.message IS 'What went wrong, in words';
COMMENT ON COLUMN redrive.push_attempts.response IS 'Begin of the answer, 4 kB at most';
COMMENT ON VIEW redrive.platform_health IS 'Platforms: their breaker, what is due, and how fast they are';
COMMENT ON COLUMN redrive.platform_health.platform IS 'Name of the platform';
COMMENT ON COLUMN redrive.platform_health.paused IS 'Is nothing sent at the moment?';
COMMENT ON COLUMN redrive.platform_health.breaker IS 'State of the circuit breaker';
COMMENT ON COLUMN redrive.platform_health.reason IS 'Why it is not closed, or the platform paused';
COMMENT ON COLUMN redrive.platform_health.blocked_until IS 'When probes may be sent';
COMMENT ON COLUMN redrive.platform_health.due IS 'Pushes that are due';
COMMENT ON COLUMN redrive.platform_health.in_flight IS 'Pushes that are being sent';
COMMENT ON COLUMN redrive.platform_health.waiting IS 'Pushes that wait for a retry';
COMMENT ON COLUMN redrive.platform_health.dead IS 'Pushes that were given up';
COMMENT ON COLUMN redrive.platform_health.blocked IS 'Pushes that the configuration blocks';
COMMENT ON COLUMN redrive.platform_health.oldest_due_age IS 'How long the oldest due push has been due';
COMMENT ON COLUMN redrive.platform_health.attempts IS 'Attempts made';
COMMENT ON COLUMN redrive.platform_health.delivered IS 'Pushes delivered';
COMMENT ON COLUMN redrive.platform_health.last_delivered_at IS 'Last delivery';
COMMENT ON COLUMN redrive.platform_health.last_failed_at IS 'Last failed attempt';
COMMENT ON COLUMN redrive.platform_health.per_second IS 'Attempts per second in the last five minutes';
COMMENT ON COLUMN redrive.platform_health.p50_ms IS 'Half of them took no longer, in ms';
COMMENT ON COLUMN redrive.platform_health.p95_ms IS '95 % of them took no longer, in ms';
COMMENT ON COLUMN redrive.platform_health.in_flight_limit IS 'Requests at once at the moment';
COMMENT ON COLUMN redrive.platform_health.max_in_flight IS 'Requests at once at most';
COMMENT ON VIEW redrive.http_requests IS 'Calls of http_request() by the caller and by roles whose rights it has';
COMMENT ON COLUMN redrive.http_requests.requested_at IS 'When it began';
COMMENT ON COLUMN redrive.http_requests.role IS 'Role that called';
COMMENT ON COLUMN redrive.http_requests.method IS 'Method';
COMMENT ON COLUMN redrive.http_requests.host IS 'Host it went to';
COMMENT ON COLUMN redrive.http_requests.ok IS 'Was the answer 2xx?';
COMMENT ON COLUMN redrive.http_requests.http_status IS 'Status of the last answer';
COMMENT ON COLUMN redrive.http_requests.attempts IS 'Attempts made';
COMMENT ON COLUMN redrive.http_requests.milliseconds IS 'How long it took';
COMMENT ON COLUMN redrive.http_requests.error IS 'Why it failed';
COMMENT ON FUNCTION redrive._check_url IS 'Raise an error unless requests can be sent to a URL';
COMMENT ON FUNCTION redrive._check_headers IS 'Raise an error unless headers may be sent';
COMMENT ON FUNCTION redrive._wake_builder IS 'Have an executor of a role with build functions look at commit';
COMMENT ON FUNCTION redrive._wake_pusher IS 'Have the pusher look at commit';
COMMENT ON FUNCTION redrive._platform IS 'Row of a platform that the caller may control';
COMMENT ON FUNCTION redrive._check_platform IS 'Checks of a platform that a constraint cannot do';
COMMENT ON FUNCTION redrive._bad_platform IS 'Raise an error about a value of a platform';
COMMENT ON FUNCTION redrive._create_platform IS 'Body of create_platform()';
COMMENT ON FUNCTION redrive._check_method IS 'Raise an error unless a method is known';
COMMENT ON FUNCTION redrive._alter_platform IS 'Body of alter_platform()';
COMMENT ON FUNCTION redrive._rearm IS 'After a change of a platform: try what was blocked, close its breaker';
COMMENT ON FUNCTION redrive._drop_platform IS 'Body of drop_platform()';
COMMENT ON FUNCTION redrive._pause_platform IS 'Body of pause_platform()';
COMMENT ON FUNCTION redrive._resume_platform IS 'Body of resume_platform()';
COMMENT ON FUNCTION redrive._set_platform_secret IS 'Body of set_platform_secret()';
COMMENT ON FUNCTION redrive._plan_tasks IS 'Let pushes follow tasks';
COMMENT ON FUNCTION redrive._record_tasks IS 'Record tasks of one owner';
COMMENT ON FUNCTION redrive._record_task IS 'Body of record_task()';
COMMENT ON FUNCTION redrive._check_task IS 'Raise an error about a task';
COMMENT ON FUNCTION redrive._task_source IS 'Trigger of attach_task_source()';
COMMENT ON FUNCTION redrive._retry_delay IS 'Time from an attempt to the next';
COMMENT ON FUNCTION redrive._reap_pushes IS 'End attempts of which nobody will tell any more';
COMMENT ON FUNCTION redrive._redrive_push IS 'Body of redrive_push()';
COMMENT ON FUNCTION redrive._plan_platform IS 'Plan pushes that a platform has not';
COMMENT ON FUNCTION redrive._push_tasks IS 'Body of the pass push_tasks';
COMMENT ON FUNCTION redrive._purge_tasks IS 'Delete old tasks';
COMMENT ON FUNCTION redrive._why_push IS 'Body of why_push()';
COMMENT ON FUNCTION redrive._doctor_pushes IS 'For the doctor: platforms and pushes';
COMMENT ON SEQUENCE redrive.http_log_http_log_id_seq IS 'Numbers of calls';
COMMENT ON SEQUENCE redrive.platforms_platform_id_seq IS 'Numbers of platforms';
COMMENT ON SEQUENCE redrive.pushes_push_id_seq IS 'Numbers of pushes';
COMMENT ON SEQUENCE redrive.tasks_task_id_seq IS 'Numbers of tasks';
-- Rights, and what pg_dump keeps.

-- A role gets what these functions give it and nothing else.  They run with
-- the rights of the caller, who has to be a superuser or own the extension:
-- with a search_path of their own, lest an operator that somebody planted in
-- the caller's be run with these rights.
CREATE FUNCTION redrive._user_routines() RETURNS SETOF regprocedure
LANGUAGE sql STABLE AS $$
    SELECT p.oid::regprocedure
    FROM pg_proc AS p
    WHERE p.pronamespace = 'redrive'::regnamespace
      AND (p.proname NOT LIKE '\_%' OR p.proname IN ('_preloaded', '_slots') OR p.proname LIKE '\_report\_%' OR p.proname = '_task_source')
      AND p.proname NOT IN ('rescue_stale', 'retry_failed', 'push_tasks', 'purge', 'run_pass', 'schedule_passes', 'unschedule_passes',
                            'set_retention', 'http_request', 'grant_user', 'grant_monitor', 'revoke_user', 'doctor')
    ORDER BY p.oid
$$;
COMMENT ON FUNCTION redrive._user_routines IS 'Functions that grant_user() grants';

-- GRANT takes even a quoted "public" for everybody.
CREATE FUNCTION redrive._check_role(role name) RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF role IS NULL THEN
        RAISE EXCEPTION 'role must not be null' USING ERRCODE = '22004', HINT = 'Give the name of a role.';
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = role) THEN
        RAISE EXCEPTION 'role "%" does not exist', role USING ERRCODE = '42704',
            HINT = CASE WHEN role = 'public' THEN 'Rights are given to single roles, not to everybody.' ELSE 'See pg_roles for the roles there are.' END;
    END IF;
END
$$;
COMMENT ON FUNCTION redrive._check_role IS 'Raise an error unless a role of this name exists';

CREATE FUNCTION redrive._grant_views(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_name text;
BEGIN
    PERFORM redrive._check_role(role);
    EXECUTE format('GRANT USAGE ON SCHEMA redrive TO %I', role);
    FOR v_name IN
        SELECT format('redrive.%I', c.relname)
        FROM pg_class AS c
        WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind = 'v'
          -- what the functions stale_batches_at(), verify() and report_html() read
          AND (c.relname NOT LIKE '\_%' OR c.relname IN ('_stale', '_verify', '_ended'))
        ORDER BY c.relname
    LOOP
        EXECUTE format('GRANT SELECT ON %s TO %I', v_name, role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION redrive._grant_views IS 'Grant what users and monitors have in common';

CREATE FUNCTION redrive.grant_user(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_routine regprocedure;
BEGIN
    PERFORM redrive._grant_views(role);
    FOR v_routine IN SELECT r FROM redrive._user_routines() AS r LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %I', v_routine, role);
    END LOOP;
END
$$;
COMMENT ON FUNCTION redrive.grant_user IS
'Let a role create handlers, submit batches to its own handlers and look at them in the views. Rows of others stay hidden. Call again after an update of the extension. Errors: 42704 unknown role, 42501 not the owner of the extension.';

CREATE FUNCTION redrive.grant_monitor(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_routine regprocedure;
BEGIN
    PERFORM redrive._grant_views(role);
    EXECUTE format('GRANT EXECUTE ON FUNCTION redrive._preloaded(), redrive._slots(), redrive.stale_batches_at(timestamptz), redrive.verify(bigint), redrive.why(bigint), redrive.doctor(), redrive.report_html(interval) TO %I', role);
    FOR v_routine IN SELECT r FROM redrive._user_routines() AS r WHERE r::text LIKE 'redrive.\_report\_%' LOOP
        EXECUTE format('GRANT EXECUTE ON ROUTINE %s TO %I', v_routine, role);
    END LOOP;
    -- this is what makes the views show everything
    EXECUTE format('GRANT SELECT (batch_id) ON redrive.batches TO %I', role);
END
$$;
COMMENT ON FUNCTION redrive.grant_monitor IS
'Let a role see the counts of all batches, handlers and workers in the views, but no payloads, keys or messages of others. Call again after an update of the extension. Errors: 42704 unknown role, 42501 not the owner of the extension.';

CREATE FUNCTION redrive.revoke_user(role name) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM redrive._check_role(role);
    EXECUTE format('REVOKE ALL ON ALL ROUTINES IN SCHEMA redrive FROM %I', role);
    EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA redrive FROM %I', role);
    EXECUTE format('REVOKE ALL ON SCHEMA redrive FROM %I', role);
END
$$;
COMMENT ON FUNCTION redrive.revoke_user IS
'Take back what grant_user and grant_monitor gave. Handlers of the role and their batches stay. Errors: 42704 unknown role, 42501 not the owner of the extension.';

-- The row of rotation is there before pg_dump's copy of it comes: the copy
-- takes its place.
CREATE FUNCTION redrive._restore_rotation() RETURNS trigger
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE redrive.rotation SET part = NEW.part, parts = NEW.parts, retention = NEW.retention, rotated_at = NEW.rotated_at;
    IF FOUND THEN
        RETURN NULL;
    END IF;
    RETURN NEW;
END
$$;
COMMENT ON FUNCTION redrive._restore_rotation IS 'Let the copy that pg_dump made replace the row of rotation';
CREATE TRIGGER rotation_restore BEFORE INSERT ON redrive.rotation FOR EACH ROW EXECUTE FUNCTION redrive._restore_rotation();

DO $$
DECLARE
    r record;
BEGIN
    -- partitions hold the rows, their parents none
    FOR r IN
        SELECT c.oid::regclass AS relation, CASE c.relname WHEN 'classification_rules' THEN 'WHERE NOT builtin' ELSE '' END AS filter
        FROM pg_class AS c
        WHERE c.relnamespace = 'redrive'::regnamespace AND c.relkind IN ('r', 'S') AND c.relname <> 'platform_secrets'
        ORDER BY c.oid
    LOOP
        PERFORM pg_extension_config_dump(r.relation, r.filter);
    END LOOP;
END
$$;

REVOKE ALL ON SCHEMA redrive FROM PUBLIC;
REVOKE ALL ON ALL TABLES IN SCHEMA redrive FROM PUBLIC;
REVOKE ALL ON ALL SEQUENCES IN SCHEMA redrive FROM PUBLIC;
REVOKE ALL ON ALL ROUTINES IN SCHEMA redrive FROM PUBLIC;
-- Last: tell the launcher, if there is one, about this database.

CREATE FUNCTION redrive._created() RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive__created';
COMMENT ON FUNCTION redrive._created IS 'Tell the launcher at commit that this database has the extension';
REVOKE ALL ON FUNCTION redrive._created() FROM PUBLIC;

-- ALTER DEFAULT PRIVILEGES may have given rights on all of this to somebody.
-- Who may write to our tables, or put a trigger on one, runs code as its owner.
DO $$
DECLARE
    v_grantee regrole;
BEGIN
    FOR v_grantee IN
        SELECT DISTINCT x.grantee::regrole
        FROM (
            SELECT nspacl FROM pg_namespace WHERE oid = 'redrive'::regnamespace
            UNION ALL
            SELECT relacl FROM pg_class WHERE relnamespace = 'redrive'::regnamespace
            UNION ALL
            SELECT proacl FROM pg_proc WHERE pronamespace = 'redrive'::regnamespace
        ) AS a (acl)
        CROSS JOIN LATERAL aclexplode(a.acl) AS x
        WHERE x.grantee NOT IN (0, current_user::regrole)
    LOOP
        EXECUTE format('REVOKE ALL ON SCHEMA redrive FROM %s', v_grantee);
        EXECUTE format('REVOKE ALL ON ALL TABLES IN SCHEMA redrive FROM %s', v_grantee);
        EXECUTE format('REVOKE ALL ON ALL SEQUENCES IN SCHEMA redrive FROM %s', v_grantee);
        EXECUTE format('REVOKE ALL ON ALL ROUTINES IN SCHEMA redrive FROM %s', v_grantee);
    END LOOP;
END
$$;

SELECT redrive._created();
