-- Tasks: recorded by applications, or by a trigger on a table of theirs.

-- Let pushes follow the tasks with these numbers, all of one owner: a row for each platform of
-- the owner, and with a new version a new budget.  Of a push that is under way
-- the record sees that more is wanted.  Returns the number of rows
-- changed.
CREATE FUNCTION redrive._plan_tasks(p_task_ids bigint[], p_platform_id int DEFAULT NULL) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    v_count bigint;
BEGIN
    -- one that is being dropped, or gets another build function, is waited for, before any push is locked
    PERFORM
    FROM redrive.platforms AS p
    WHERE p.owner = (SELECT t.owner FROM redrive.tasks AS t WHERE t.task_id = p_task_ids[1])
      AND p.platform_id = coalesce(p_platform_id, p.platform_id)
      AND redrive._share_planning(p.platform_id, true)
    ORDER BY p.platform_id
    FOR KEY SHARE OF p;
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
        state = 'pending',
        retry_count = 0,
        free_count = 0,
        next_attempt_at = now()
    WHERE u.wanted_version < excluded.wanted_version OR u.state = 'blocked' OR (u.state = 'delivered' AND u.pushed_version < u.wanted_version);
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
    WHERE n.key = '' OR octet_length(n.key) > 2600 OR greatest(length(n.key), length(n.status), length(n.process)) > 1000;
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
        WHERE u.task_id = n.task_id AND u.state NOT IN ('delivered', 'dead', 'blocked'); -- so that it goes by task_id
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
    ELSIF octet_length(p_task_key) > 2600 THEN -- what an index can hold
        RAISE EXCEPTION 'invalid value for "task_key"' USING ERRCODE = '22023', DETAIL = format('It has %s bytes.', octet_length(p_task_key)), HINT = 'Keys have 1 to 1000 characters, and at most 2600 bytes.';
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
    v_columns name[];
    v_missing name;
    v_parent regclass;
    v_arguments text;
BEGIN
    IF relation IS NULL OR key_column IS NULL OR status_column IS NULL THEN
        RAISE EXCEPTION 'relation, key_column and status_column must not be null' USING ERRCODE = '22004', HINT = 'Name a table, and the columns with the key and the status of each task.';
    END IF;
    SELECT array_agg(c) INTO v_columns FROM unnest(payload_columns) AS c;
    IF payload_columns IS NOT NULL AND (v_columns IS NULL OR array_position(v_columns, NULL) IS NOT NULL) THEN
        RAISE EXCEPTION 'invalid value for "payload_columns"' USING ERRCODE = '22023', DETAIL = 'It is empty, or has a NULL in it.', HINT = 'Name columns of the table, or leave the argument out to get all.';
    END IF;
    SELECT c.relkind, c.relowner INTO v_kind, v_owner FROM pg_class AS c WHERE c.oid = relation;
    -- a statement calls the triggers of the table that it names, and no others
    SELECT i.inhparent::regclass INTO v_parent
    FROM pg_inherits AS i
    WHERE i.inhrelid = relation AND NOT EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = i.inhparent AND g.tgfoid = 'redrive._task_source()'::regprocedure)
    LIMIT 1;
    IF v_kind IS NULL OR v_kind NOT IN ('r', 'p') THEN
        RAISE EXCEPTION '% cannot be a source of tasks', relation USING ERRCODE = '42809',
            DETAIL = 'It is not a table of this database.', HINT = 'Attach a table, or call redrive.record_task() where the status changes.';
    ELSIF v_parent IS NOT NULL THEN
        RAISE EXCEPTION '% cannot be a source of tasks', relation USING ERRCODE = '42809',
            DETAIL = format('It is a part of %s, and what is written through that would not be recorded.', v_parent),
            HINT = format('Attach %s, and then this one too if rows are written to it by its own name.', v_parent);
    ELSIF NOT pg_has_role(v_owner, 'USAGE') THEN
        RAISE EXCEPTION 'permission denied for table %', relation USING ERRCODE = '42501',
            DETAIL = 'It belongs to another role, and so will the tasks.', HINT = 'Ask the owner of the table to attach it.';
    END IF;
    SELECT n.name INTO v_missing
    FROM unnest(ARRAY[key_column, status_column, test_column] || v_columns) AS n (name)
    WHERE n.name IS NOT NULL AND NOT EXISTS (
        SELECT FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attname = n.name AND a.attnum > 0 AND NOT a.attisdropped)
    LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION 'column "%" of % does not exist', v_missing, relation USING ERRCODE = '42703',
            DETAIL = format('Its columns are %s.', (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attnum > 0 AND NOT a.attisdropped)),
            HINT = 'Name columns of the table.';
    ELSIF test_column IS NOT NULL AND (SELECT a.atttypid FROM pg_attribute AS a WHERE a.attrelid = relation AND a.attname = test_column) <> 'boolean'::regtype THEN
        RAISE EXCEPTION 'column "%" of % is not boolean', test_column, relation USING ERRCODE = '42804', HINT = 'The test column says true for tests.';
    ELSIF EXISTS (SELECT FROM pg_trigger AS g WHERE g.tgrelid = relation AND g.tgfoid = 'redrive._task_source()'::regprocedure) THEN
        RAISE EXCEPTION '% is attached already', relation USING ERRCODE = '42710', HINT = 'Run redrive.detach_task_source() first.';
    END IF;
    SELECT string_agg(quote_literal(coalesce(n.name, '')), ', ' ORDER BY n.place) INTO v_arguments
    FROM unnest(ARRAY[key_column, status_column, test_column] || v_columns) WITH ORDINALITY AS n (name, place);
    EXECUTE format('CREATE TRIGGER redrive_task_source_insert AFTER INSERT ON %s REFERENCING NEW TABLE AS redrive_rows FOR EACH STATEMENT EXECUTE FUNCTION redrive._task_source(%s)', relation, v_arguments);
    EXECUTE format('CREATE TRIGGER redrive_task_source_update AFTER UPDATE ON %s REFERENCING NEW TABLE AS redrive_rows FOR EACH STATEMENT EXECUTE FUNCTION redrive._task_source(%s)', relation, v_arguments);
END
$$;
COMMENT ON FUNCTION redrive.attach_task_source IS
'Record a task for each row of a table that is inserted or updated from now on, as a task of the table''s owner: key and status are texts of these columns, the payload an object of payload_columns (NULL = all). Rows without key or status are left out; test_column says which are tests. Deleted rows leave their tasks as they are. Errors: 42501 not your table, 42809 not a table, 42703 no such column, 42804 test_column not boolean, 22023 payload_columns empty or with a NULL, 42710 attached already.';

CREATE FUNCTION redrive.detach_task_source(relation regclass) RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_trigger name;
BEGIN
    -- its owner may have renamed them
    FOR v_trigger IN SELECT g.tgname FROM pg_trigger AS g WHERE g.tgrelid = relation AND g.tgfoid = 'redrive._task_source()'::regprocedure LOOP
        EXECUTE format('DROP TRIGGER %I ON %s', v_trigger, relation);
    END LOOP;
    IF NOT FOUND THEN
        RAISE EXCEPTION '% is not attached', coalesce(relation::text, 'NULL') USING ERRCODE = '42704', HINT = 'Nothing has to be done.';
    END IF;
END
$$;
COMMENT ON FUNCTION redrive.detach_task_source IS
'Undo attach_task_source(); the tasks stay. Errors: 42704 not attached, 42501 not your table.';
