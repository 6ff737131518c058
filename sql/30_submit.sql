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
'Submit a sealed batch, one item per payload, and return its batch_id. keys: the application''s own identifiers, NULL elements allowed; each key is locked until its item is final. run_at: not before this time. priority: higher first. With an idempotency_key that was used before for this handler the earlier batch_id is returned and nothing is submitted. Errors: 42704 unknown handler, 42501 not yours, 22004 NULL payload, 22023 empty, arrays of different length or run_at out of range, 55P03 key locked by another batch.';

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
