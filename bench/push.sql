-- What the rows "push" and "plan" need: tasks in bulk, and one after the other.

-- Forget all platforms and tasks.
CREATE PROCEDURE reset_pushes()
LANGUAGE plpgsql AS $$
BEGIN
    PERFORM redrive.drop_platform(platform) FROM redrive.platform_health;
    TRUNCATE redrive.tasks, redrive.pushes, redrive.push_bodies, redrive.push_log;
END
$$;

SELECT 'CREATE ROLE slow LOGIN' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'slow') \gexec
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

-- Tasks that changed at even intervals over the last 6 days and were pushed to three platforms: delivered, or
-- waiting if they are within the window.  The platforms are paused.
CREATE PROCEDURE make_pushes(p_n int)
LANGUAGE sql AS $$
    SELECT redrive.create_platform('p' || i, 'https://localhost/'), redrive.pause_platform('p' || i) FROM generate_series(1, 3) AS i;
    INSERT INTO redrive.tasks (owner, task_key, status, payload, is_test, changed_at)
    SELECT current_user::regrole, 'task ' || i, 'done', '{}', false, now() - interval '6 days' * i / p_n FROM generate_series(1, p_n) AS i;
    INSERT INTO redrive.pushes (task_id, platform_id, wanted_version, wanted_status, pushed_version, pushed_status, awaits_build, state)
    SELECT t.task_id, p.platform_id, 1, 'done', 1, 'done', false, 'delivered' FROM redrive.tasks AS t CROSS JOIN redrive.platforms AS p;
$$;
CREATE PROCEDURE make_waiting()
LANGUAGE sql AS $$
    UPDATE redrive.pushes AS u SET state = 'waiting', pushed_version = NULL, pushed_status = NULL
    FROM redrive.tasks AS t
    WHERE t.task_id = u.task_id AND t.changed_at > now() - interval '2 days 23 hours';
$$;
