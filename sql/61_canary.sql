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
