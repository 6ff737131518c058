-- Tables of the task centre: what to push, where to, and what came of it.

CREATE TYPE redrive.push_state AS ENUM ('pending', 'in_flight', 'waiting', 'delivered', 'dead', 'blocked');
COMMENT ON TYPE redrive.push_state IS 'pending -> in_flight -> delivered, waiting or dead; waiting -> in_flight when due; blocked = not sent before the configuration of the platform changes; a new version makes it pending again. in_flight is what views show of a push that is claimed: its row stays pending or waiting meanwhile';

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
    secrets redrive.secret_kind[] NOT NULL DEFAULT '{}',
    created_at timestamptz NOT NULL DEFAULT now(),
    planned_at timestamptz,
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
CREATE INDEX tasks_changed_idx ON redrive.tasks (changed_at);
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
    last_claim_id bigint NOT NULL DEFAULT 0,
    next_attempt_at timestamptz NOT NULL DEFAULT now(),
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
    CONSTRAINT pushes_state_check CHECK (state <> 'in_flight'),
    CONSTRAINT pushes_retry_count_check CHECK (retry_count >= 0 AND free_count >= 0)
) WITH (fillfactor = 70);
CREATE INDEX pushes_due_idx ON redrive.pushes (platform_id, awaits_build, next_attempt_at) WHERE state IN ('pending', 'waiting');
CREATE INDEX pushes_given_up_idx ON redrive.pushes (platform_id) WHERE state IN ('dead', 'blocked');
COMMENT ON TABLE redrive.pushes IS 'One row per task and platform: what is wanted there, what was delivered, and the next attempt';

-- A claim of the pusher's: one row for all pushes of a platform that it took at once,
-- written before anything is sent.  A push is under way until its last_claim_id says
-- that this claim, or one after it, has ended.
CREATE TABLE redrive.push_claims (
    claim_id bigint GENERATED ALWAYS AS IDENTITY,
    platform_id int NOT NULL,
    pusher bigint NOT NULL,
    is_probe boolean NOT NULL,
    claimed_at timestamptz NOT NULL,
    lease_until timestamptz NOT NULL,
    push_ids bigint[] NOT NULL,
    versions bigint[] NOT NULL,
    CONSTRAINT push_claims_pkey PRIMARY KEY (claim_id),
    CONSTRAINT push_claims_check CHECK (cardinality(push_ids) = cardinality(versions))
);
COMMENT ON TABLE redrive.push_claims IS 'What the pusher has claimed and not recorded yet: requests that are under way';

CREATE VIEW redrive._in_flight AS
SELECT m.push_id, m.version, c.claim_id, c.platform_id, c.pusher, c.is_probe, c.claimed_at, c.lease_until
FROM redrive.push_claims AS c
CROSS JOIN LATERAL unnest(c.push_ids, c.versions) AS m (push_id, version)
CROSS JOIN LATERAL (SELECT FROM redrive.pushes AS x WHERE x.push_id = m.push_id AND x.last_claim_id < c.claim_id OFFSET 0) AS u;

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
