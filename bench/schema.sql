-- The work that is measured: approve a to-do item, one UPDATE by primary key.
-- A negative amount makes it fail after the UPDATE.
CREATE TABLE todo (id bigint PRIMARY KEY, state text, amount int, approved_at timestamptz);
CREATE TABLE failure (id bigint, message text);

CREATE FUNCTION approve_todo(p_id bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_amount int;
BEGIN
    UPDATE todo SET state = 'approved', approved_at = now() WHERE id = p_id RETURNING amount INTO v_amount;
    IF v_amount < 0 THEN
        RAISE EXCEPTION 'amount of todo % is negative', p_id;
    END IF;
END
$$;

-- The same as a row handler.
CREATE FUNCTION approve(payload jsonb) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_id bigint := (payload ->> 'id')::bigint;
    v_amount int;
BEGIN
    UPDATE todo SET state = 'approved', approved_at = now() WHERE id = v_id RETURNING amount INTO v_amount;
    IF v_amount < 0 THEN
        RAISE EXCEPTION 'amount of todo % is negative', v_id;
    END IF;
END
$$;

-- The same with the time at which the item ran.
CREATE FUNCTION approve_now(payload jsonb) RETURNS void
LANGUAGE sql AS $$
    UPDATE todo SET state = 'approved', approved_at = clock_timestamp() WHERE id = (payload ->> 'id')::bigint
$$;

-- What it is compared with: a savepoint per item, p_size items per commit, no books but a note of each failure.
CREATE PROCEDURE loop_savepoint(p_from bigint, p_to bigint, p_size int)
LANGUAGE plpgsql AS $$
DECLARE
    i bigint;
    s bigint := p_from;
BEGIN
    WHILE s <= p_to LOOP
        FOR i IN s .. least(s + p_size - 1, p_to) LOOP
            BEGIN
                PERFORM approve_todo(i);
            EXCEPTION WHEN OTHERS THEN
                INSERT INTO failure VALUES (i, sqlerrm);
            END;
        END LOOP;
        COMMIT;
        s := s + p_size;
    END LOOP;
END
$$;

-- The handler alone: no savepoint either.
CREATE PROCEDURE loop_plain(p_n bigint, p_size int)
LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. p_n LOOP
        PERFORM approve_todo(i);
        IF i % p_size = 0 THEN
            COMMIT;
        END IF;
    END LOOP;
END
$$;

-- What set handlers are compared with: one UPDATE per p_size items, no books.
CREATE PROCEDURE loop_set(p_from bigint, p_to bigint, p_size int)
LANGUAGE plpgsql AS $$
DECLARE
    s bigint := p_from;
BEGIN
    WHILE s <= p_to LOOP
        UPDATE todo SET state = 'approved', approved_at = now() WHERE id = ANY (ARRAY(SELECT generate_series(s, least(s + p_size - 1, p_to))));
        COMMIT;
        s := s + p_size;
    END LOOP;
END
$$;

-- Pick-up latency.
CREATE TABLE ping (n int, started_at timestamptz);
CREATE TABLE sent (n int, before_commit timestamptz, after_commit timestamptz);

CREATE FUNCTION pong(payload jsonb) RETURNS void
LANGUAGE sql AS $$
    INSERT INTO ping VALUES ((payload ->> 'n')::int, clock_timestamp())
$$;

-- Send p_n items, one per transaction, at random moments.  The time after the commit is that at which COMMIT
-- returned in the sending session.
CREATE PROCEDURE send_pings(p_n int)
LANGUAGE plpgsql AS $$
DECLARE
    v_before timestamptz[];
    v_after timestamptz[];
BEGIN
    FOR i IN 1 .. p_n LOOP
        PERFORM redrive.send('ping', jsonb_build_object('n', i));
        v_before[i] := clock_timestamp();
        COMMIT;
        v_after[i] := clock_timestamp();
        PERFORM pg_sleep(0.005 + random() * 0.04);
    END LOOP;
    INSERT INTO sent SELECT * FROM unnest((SELECT array_agg(i) FROM generate_series(1, p_n) AS i), v_before, v_after);
END
$$;

CREATE FUNCTION nothing(payload jsonb) RETURNS void LANGUAGE sql AS 'SELECT';

-- Submit: the rows, and the bare table with the same key.
CREATE TABLE source (id bigint, payload jsonb);
CREATE TABLE bare (batch_id bigint, item_no bigint, payload jsonb, PRIMARY KEY (batch_id, item_no));

CREATE EXTENSION pg_redrive;
SELECT redrive.create_handler('approve', 'approve', max_retries => 0);

-- The same as set handlers: an UPDATE; one that raises; one that returns what it does not want.
CREATE FUNCTION approve_set(items redrive.item[]) RETURNS void
LANGUAGE sql AS $$
    UPDATE todo SET state = 'approved', approved_at = now() WHERE id = ANY (ARRAY(SELECT (i.payload ->> 'id')::bigint FROM unnest(items) AS i))
$$;
CREATE FUNCTION approve_set_or_raise(items redrive.item[]) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    v_bad bigint;
BEGIN
    WITH done AS (
        UPDATE todo SET state = 'approved', approved_at = now()
        WHERE id = ANY (ARRAY(SELECT (i.payload ->> 'id')::bigint FROM unnest(items) AS i))
        RETURNING id, amount
    )
    SELECT min(id) INTO v_bad FROM done WHERE amount < 0;
    IF v_bad IS NOT NULL THEN
        RAISE EXCEPTION 'amount of todo % is negative', v_bad;
    END IF;
END
$$;
CREATE FUNCTION approve_set_and_tell(items redrive.item[]) RETURNS SETOF redrive.outcome
LANGUAGE sql AS $$
    WITH done AS (
        UPDATE todo SET state = 'approved', approved_at = now()
        WHERE id = ANY (ARRAY(SELECT (i.payload ->> 'id')::bigint FROM unnest(items) AS i)) AND amount >= 0
        RETURNING id
    )
    SELECT i.item_no, 'failed'::redrive.outcome_kind, format('amount of todo %s is negative', i.payload ->> 'id'), NULL, NULL::interval
    FROM unnest(items) AS i
    WHERE (i.payload ->> 'id')::bigint NOT IN (SELECT id FROM done)
$$;
SELECT redrive.create_handler('approve_set', 'approve_set', 'set', max_retries => 0);
SELECT redrive.create_handler('approve_set_or_raise', 'approve_set_or_raise', 'set', max_retries => 0);
SELECT redrive.create_handler('approve_set_and_tell', 'approve_set_and_tell', 'set', max_retries => 0);
SELECT redrive.create_handler('approve_now', 'approve_now', max_retries => 0);
SELECT redrive.create_handler('ping', 'pong', max_retries => 0);
SELECT redrive.create_handler('nothing', 'nothing', max_retries => 0);
