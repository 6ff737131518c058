-- What the rows "push" and "plan" need: tasks in bulk, and one after the other.

-- Forget all platforms and tasks.
CREATE PROCEDURE reset_pushes()
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive.drop_platform(platform) FROM redrive.platform_health;
    TRUNCATE redrive.tasks, redrive.pushes, redrive.push_bodies, redrive.push_log;
END
$$;

CREATE ROLE slow LOGIN;
SELECT redrive.grant_user('slow');

-- Record p_n tasks in transactions of 1 000, as a table that is a source of tasks would.
CREATE TABLE forms (form_no text PRIMARY KEY, state text, who text);
SELECT redrive.attach_task_source('forms', 'form_no', 'state');
CREATE PROCEDURE record_forms(p_n int)
LANGUAGE plpgsql AS $$
BEGIN
    TRUNCATE forms;
    FOR i IN 0 .. p_n / 1000 - 1 LOOP
        INSERT INTO forms SELECT 'form ' || g, 'submitted', 'approver ' || g FROM generate_series(i * 1000 + 1, i * 1000 + 1000) AS g;
        COMMIT;
    END LOOP;
END
$$;

-- Record p_n tasks, one per transaction, at random moments.  The time after the commit is that at which COMMIT returned.
CREATE TABLE recorded (task_key text, after_commit timestamptz);
CREATE PROCEDURE record_one_by_one(p_n int)
LANGUAGE plpgsql AS $$
DECLARE
    v_after timestamptz[];
BEGIN
    TRUNCATE recorded;
    FOR i IN 1 .. p_n LOOP
        PERFORM redrive.record_task('one ' || i, 'submitted');
        COMMIT;
        v_after[i] := clock_timestamp();
        PERFORM pg_sleep(0.005 + random() * 0.04);
    END LOOP;
    INSERT INTO recorded SELECT 'one ' || i, v_after[i] FROM generate_series(1, p_n) AS i;
END
$$;
