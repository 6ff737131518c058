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
    INSERT INTO redrive.handlers (
        name, kind, owner, function, signature, max_retries, retry_delay, retry_factor, retry_delay_max,
        stale_after, start_timeout, retry_window, item_timeout, isolation, commit_interval,
        max_workers, tolerated_failures, on_unlock, on_finish, notify)
    VALUES (
        p_name, p_kind, p_caller, p_function, p_signature::redrive.handler_signature, p_max_retries, p_retry_delay, p_retry_factor, p_retry_delay_max,
        p_stale_after, p_start_timeout, p_retry_window, p_item_timeout, p_isolation, p_commit_interval,
        p_max_workers, p_tolerated_failures, p_on_unlock, p_on_finish, p_notify);
EXCEPTION
    WHEN unique_violation THEN
        RAISE EXCEPTION 'handler "%" already exists', p_name USING ERRCODE = '42710',
            HINT = 'Change it with redrive.alter_handler(), or choose another name.';
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
        RAISE EXCEPTION 'cannot unset "%"', coalesce(v_wrong, 'NULL') USING ERRCODE = '22023', DETAIL = 'It is no setting, or one that has to have a value.',
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
'Create a handler owned by the caller. function: a name, or a name with argument types, of a function of (payload jsonb), (key text, payload jsonb) or (item redrive.item); for kind set, of (items redrive.item[]) that returns void or SETOF redrive.outcome. max_retries 3 means 4 attempts. retry_delay NULL = failures wait for the retry_failed pass. on_unlock(key text) is called when an item''s key is unlocked, on_finish(batch_id bigint, run_no int) when a batch ends. notify, for kind external: NOTIFY redrive_<name> when there is something to claim. Errors: 42710 name taken, 42883 no such function, 42602 not a name, 42725 several fit, 22023 value out of range, 42501 no EXECUTE.';

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
'Drop a handler with the records of its ended batches, and what is left of their callbacks. Errors: 55006 while batches live, 42704 unknown, 42501 not yours.';

CREATE FUNCTION redrive.pause_handler(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.pause_handler IS
'Claim nothing more for this handler; chunks that run are finished. Errors: 42704 unknown, 42501 not yours.';

CREATE FUNCTION redrive.resume_handler(name text) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.resume_handler IS
'Undo pause_handler. Errors: 42704 unknown, 42501 not yours.';
