-- Platforms: create, alter, drop, pause, resume, and their secrets.

CREATE TYPE redrive.task AS (task_key text, status text, version bigint, process text, payload jsonb, created_at timestamptz, changed_at timestamptz);
COMMENT ON TYPE redrive.task IS 'One task as a build function sees it';

CREATE FUNCTION redrive._check_url(url text, allow_http boolean) RETURNS void
LANGUAGE c IMMUTABLE STRICT AS 'MODULE_PATHNAME', 'redrive__check_url';

CREATE FUNCTION redrive._unlisted_port(url text) RETURNS int
LANGUAGE c STABLE STRICT AS 'MODULE_PATHNAME', 'redrive__unlisted_port';

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

-- The constraints of arrays are about lists: array_position() raises an error of its own for several dimensions.
CREATE FUNCTION redrive._check_list(p_name text, p_list anyarray) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF array_ndims(p_list) > 1 THEN
        RAISE EXCEPTION 'invalid value for "%"', p_name USING ERRCODE = '22023', DETAIL = format('It is an array of %s dimensions.', array_ndims(p_list)),
            HINT = 'Give a list, for example ARRAY[a, b].';
    END IF;
END
$$;

-- Those who plan pushes to a platform, who record tasks for example, share a lock to the end of their transaction; who drops it or
-- changes how it is planned for has it alone.  The first returns false if it is not to wait and somebody has it alone, or wants it.
CREATE FUNCTION redrive._share_planning(p_platform_id int, p_wait boolean) RETURNS boolean
LANGUAGE c VOLATILE STRICT COST 1000 AS 'MODULE_PATHNAME', 'redrive__share_planning'; -- asked of no other platforms
CREATE FUNCTION redrive._await_planning(p_platform_id int) RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'redrive__await_planning';
CREATE FUNCTION redrive._stop_planning(p_platform_id int) RETURNS void
LANGUAGE c VOLATILE STRICT AS 'MODULE_PATHNAME', 'redrive__stop_planning';

-- Lock a platform that is to be dropped or planned for in another way.  First whoever changes it or plans for it now is waited for,
-- however long that takes, and others go on; then those who have begun meanwhile, for a short time, in which the others wait.  If that
-- is not enough, once more and twice as long: so it ends, and nobody waits for much longer than such transactions take.
CREATE FUNCTION redrive._lock_platform(p redrive.platforms) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_lock_timeout int := (SELECT s.setting FROM pg_settings AS s WHERE s.name = 'lock_timeout');
    v_ms int := 100;
BEGIN
    LOOP
        BEGIN
            PERFORM FROM redrive.platforms WHERE platform_id = p.platform_id FOR NO KEY UPDATE;
            RAISE EXCEPTION 'unlock the platform' USING ERRCODE = 'RD000';
        EXCEPTION WHEN SQLSTATE 'RD000' THEN
            PERFORM redrive._await_planning(p.platform_id);
        END;
        BEGIN
            PERFORM set_config('lock_timeout', least(v_ms, nullif(v_lock_timeout, 0))::text, true);
            PERFORM redrive._stop_planning(p.platform_id);
            PERFORM FROM redrive.platforms WHERE platform_id = p.platform_id FOR UPDATE;
            PERFORM set_config('lock_timeout', v_lock_timeout::text, true);
            RETURN;
        EXCEPTION WHEN lock_not_available THEN
            IF v_lock_timeout BETWEEN 1 AND v_ms THEN
                RAISE;
            END IF;
            v_ms := v_ms * 2;
        END;
    END LOOP;
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

-- What is allowed, but will not work.
CREATE FUNCTION redrive._warn_of_port(p_url text, p_allow_cidr cidr[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF p_allow_cidr = '{}' AND redrive._unlisted_port(p_url) IS NOT NULL THEN
        RAISE WARNING 'pushes to port % of the public network are refused', redrive._unlisted_port(p_url) USING
            DETAIL = format('redrive.http_ports is "%s".', current_setting('redrive.http_ports')),
            HINT = 'Ask a superuser to add it to redrive.http_ports, and to run redrive.redrive_push() for the platform when pushes were refused before. Ranges that allow_cidr opens are open on all ports.';
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
    PERFORM redrive._check_method(p_method);
    PERFORM redrive._check_success_when(p_success_when);
    PERFORM redrive._check_list('permanent_status', p_permanent_status), redrive._check_list('allow_cidr', p_allow_cidr);
    PERFORM redrive._check_platform(p_caller, p_url, p_allow_http, p_headers, p_allow_cidr);
    PERFORM redrive._warn_of_port(p_url, p_allow_cidr);
    INSERT INTO redrive.platforms (name, owner, url, method, headers, build, success_when, max_retries, retry_interval, retry_factor, retry_delay_max,
        permanent_status, push_window, timeout, connect_timeout, lease, max_in_flight, rate_limit, allow_http, allow_cidr)
    VALUES (p_name, p_caller, p_url, upper(p_method)::redrive.http_method, p_headers, p_build, p_success_when, p_max_retries, p_retry_interval, p_retry_factor, p_retry_delay_max,
        p_permanent_status, p_push_window, p_timeout, p_connect_timeout, p_lease, p_max_in_flight, p_rate_limit, p_allow_http, p_allow_cidr)
    RETURNING platform_id INTO v_id;
    INSERT INTO redrive.platform_states (platform_id) VALUES (v_id);
    PERFORM redrive._plan_platform(v_id, now());
    PERFORM redrive._wake_pusher(), redrive._wake_builder(p_caller);
EXCEPTION
    WHEN unique_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        IF v_constraint <> 'platforms_name_key' THEN
            RAISE;
        END IF;
        RAISE EXCEPTION 'platform "%" already exists', p_name USING ERRCODE = '42710',
            HINT = 'Change it with redrive.alter_platform(), or choose another name.';
    WHEN check_violation THEN
        GET STACKED DIAGNOSTICS v_constraint = CONSTRAINT_NAME;
        PERFORM redrive._bad_platform(v_constraint);
    WHEN not_null_violation THEN
        GET STACKED DIAGNOSTICS v_column = COLUMN_NAME;
        RAISE EXCEPTION '% must not be null', v_column USING ERRCODE = '22004',
            HINT = 'Leave the argument out to get its default.';
END
$$;

-- A path is printed with quotes around each name and string, and $ before the quote of a variable only.
CREATE FUNCTION redrive._check_success_when(p_success_when jsonpath) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_variable text := (
        SELECT q.m[2]
        FROM regexp_matches(p_success_when::text, '(\$?)"((?:[^"\\]|\\.)*)"', 'g') AS q (m)
        WHERE q.m[1] = '$'
        LIMIT 1);
BEGIN
    IF v_variable IS NOT NULL THEN
        RAISE EXCEPTION 'invalid value for "success_when"' USING ERRCODE = '22023', DETAIL = format('It has the variable "%s".', v_variable),
            HINT = 'The answer is $, and there are no variables: for example $.code == 0.';
    END IF;
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
        RAISE EXCEPTION 'cannot unset "%"', coalesce(v_wrong, 'NULL') USING ERRCODE = '22023', DETAIL = 'It is no setting, or one that has to have a value.',
            HINT = 'These can be unset: build, success_when, rate_limit.';
    END IF;
    PERFORM redrive._check_method(p_method);
    PERFORM redrive._check_success_when(p_success_when);
    PERFORM redrive._check_list('permanent_status', p_permanent_status), redrive._check_list('allow_cidr', p_allow_cidr);
    PERFORM redrive._check_platform(p_caller, coalesce(p_url, p.url), coalesce(p_allow_http, p.allow_http), coalesce(p_headers, p.headers), p_allow_cidr);
    IF p_url IS NOT NULL OR p_allow_cidr IS NOT NULL THEN
        PERFORM redrive._warn_of_port(coalesce(p_url, p.url), coalesce(p_allow_cidr, p.allow_cidr));
    END IF;
    IF p_build IS NOT NULL OR 'build' = ANY (v_unset) THEN
        -- nobody may plan by the old function
        PERFORM redrive._lock_platform(p);
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
        push_window = coalesce(p_push_window, push_window),
        timeout = coalesce(p_timeout, timeout),
        connect_timeout = coalesce(p_connect_timeout, connect_timeout),
        lease = coalesce(p_lease, lease),
        max_in_flight = coalesce(p_max_in_flight, max_in_flight),
        rate_limit = CASE WHEN 'rate_limit' = ANY (v_unset) THEN NULL ELSE coalesce(p_rate_limit, rate_limit) END,
        allow_http = coalesce(p_allow_http, allow_http),
        allow_cidr = coalesce(p_allow_cidr, allow_cidr)
    WHERE platform_id = p.platform_id;
    -- a larger window or budget takes up what the old one gave up, but not what a permanent status ended
    UPDATE redrive.pushes AS u SET
        state = 'waiting',
        retry_count = u.retry_count + g.exhausted::int,
        next_attempt_at = CASE WHEN g.exhausted THEN u.failed_at + redrive._retry_delay(g.retry_interval, g.retry_factor, g.retry_delay_max, u.retry_count, u.push_id) ELSE u.next_attempt_at END,
        error_class = CASE WHEN g.exhausted THEN u.error_class END,
        message = CASE WHEN g.exhausted THEN u.message END
    FROM (
        SELECT x.push_id, x.error_class IS DISTINCT FROM 'expired' AS exhausted, n.retry_interval, n.retry_factor, n.retry_delay_max
        FROM redrive.platforms AS n
        JOIN redrive.pushes AS x ON x.platform_id = n.platform_id AND x.state = 'dead'
        JOIN redrive.tasks AS t ON t.task_id = x.task_id AND NOT t.is_test AND t.changed_at >= now() - n.push_window
        WHERE n.platform_id = p.platform_id
          AND (x.error_class = 'expired'
               OR (x.retry_count >= p.max_retries AND x.retry_count < n.max_retries AND (x.http_status = ANY (p.permanent_status)) IS NOT TRUE))
        ORDER BY x.task_id
        FOR NO KEY UPDATE OF x) AS g
    WHERE u.push_id = g.push_id;
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
    -- the pusher reads the platform again, and the pass all its tasks
    UPDATE redrive.platforms SET config_version = config_version + 1, planned_at = NULL WHERE platform_id = p_platform_id;
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
    PERFORM redrive._lock_platform(p);
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
    -- one at a time: each lists what the others have set
    PERFORM FROM redrive.platforms WHERE platform_id = p.platform_id FOR NO KEY UPDATE;
    IF NOT FOUND THEN
        RAISE EXCEPTION 'platform "%" does not exist', p_name USING ERRCODE = '42704',
            DETAIL = 'It was dropped a moment ago.', HINT = 'Create it with redrive.create_platform().';
    END IF;
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
'Create a platform owned by the caller: the tasks of this role are pushed there. max_retries 3 means 4 attempts, retry_interval apart, times retry_factor each time up to retry_delay_max. build: a function of (redrive.task) that returns the body as jsonb, run as the owner in a worker of its own, once per version of a task; NULL = the body is the task. success_when: a path that must be true of the answer, for platforms that answer 200 to what they reject. permanent_status: not retried. Tasks that changed longer than push_window ago are left alone. max_in_flight: requests at once; rate_limit: requests per second, NULL = any. lease: after which a push of which nothing is known is tried again, at least timeout + 30 s. allow_http: not only https; allow_cidr: private ranges that may be reached, set by superusers only. Errors: 42710 name taken, 22023 invalid value, 22004 NULL, 42883 no such function, 42602 not a name, 42501 no permission.';

CREATE FUNCTION redrive.alter_platform(
    name text, url text DEFAULT NULL, max_retries int DEFAULT NULL, retry_interval interval DEFAULT NULL, retry_factor float8 DEFAULT NULL,
    method text DEFAULT NULL, headers jsonb DEFAULT NULL, build text DEFAULT NULL, success_when jsonpath DEFAULT NULL,
    permanent_status int[] DEFAULT NULL, push_window interval DEFAULT NULL, timeout interval DEFAULT NULL, connect_timeout interval DEFAULT NULL,
    max_in_flight int DEFAULT NULL, rate_limit float8 DEFAULT NULL, allow_http boolean DEFAULT NULL, allow_cidr cidr[] DEFAULT NULL,
    retry_delay_max interval DEFAULT NULL, lease interval DEFAULT NULL, unset text[] DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_alter_platform';
COMMENT ON FUNCTION redrive.alter_platform IS
'Change a platform. NULL leaves a setting unchanged; unset lists settings to make NULL: build, success_when, rate_limit. Takes effect with the next request; pushes that were blocked by the configuration are tried again, and the breaker is closed; larger max_retries or push_window take up again what the smaller ones gave up; with build, bodies are made anew. Errors: 42704 unknown, 42501 not yours, 22023 invalid value, 42883 no such function, 42602 not a name.';

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
