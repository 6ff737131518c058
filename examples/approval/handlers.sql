-- The handlers: what is done with one item, and what is told to the application.

-- Send a message.  In real life this calls the mail server, which no rollback calls
-- back; that is why its handler has isolation => 'item', one transaction per message.
CREATE FUNCTION send_message(payload jsonb) RETURNS void
LANGUAGE sql SET search_path = approval, pg_temp AS $$
    INSERT INTO sent_messages (recipient, message) VALUES (payload ->> 'to', payload ->> 'message')
$$;

-- Approve one task.  The key is its number, the payload says who approves.
--
-- All of it is one transaction with the outcome and the counters of the batch: a task is
-- approved and counted, or neither.
CREATE FUNCTION approve_task(key text, payload jsonb) RETURNS void
LANGUAGE plpgsql SET search_path = approval, pg_temp AS $$
DECLARE
    v_form forms;
    v_amount numeric;
BEGIN
    SELECT f.* INTO STRICT v_form
    FROM tasks AS t
    JOIN forms AS f ON f.form_id = t.form_id
    WHERE t.task_id = key::int
    FOR UPDATE;

    -- Validation: it makes no sense to try again.  The item is ignored.
    IF v_form.state <> 'submitted' THEN
        PERFORM redrive.raise_validation(format('form %s is %s', v_form.form_id, v_form.state));
    ELSIF v_form.fields ->> 'amount' IS NULL THEN
        PERFORM redrive.raise_validation(format('form %s has no amount', v_form.form_id));
    END IF;

    -- A form that holds something else than a number raises 22P02, a data error:
    -- the item fails at once, for nothing gets better by trying again.
    v_amount := v_form.fields ->> 'amount';

    -- The message goes out when this transaction has committed, and not at all if
    -- something below fails.
    PERFORM redrive.send('approval: message', jsonb_build_object(
        'to', v_form.applicant, 'message', format('Your form %s is approved: %s EUR.', v_form.form_id, v_amount)));

    -- A cost centre that does not exist yet raises 23503: tried again, it may arrive.
    INSERT INTO bookings (form_id, cost_center, amount, approved_by)
    VALUES (v_form.form_id, v_form.fields ->> 'cost_center', v_amount, payload ->> 'approver');

    -- An error that somebody can do something about: tried again.
    UPDATE cost_centers SET spent = spent + v_amount
    WHERE code = v_form.fields ->> 'cost_center' AND spent + v_amount <= budget;
    IF NOT FOUND THEN
        PERFORM redrive.raise_user_error(format('the budget of %s is used up', v_form.fields ->> 'cost_center'),
            detail => format('Form %s needs %s EUR.', v_form.form_id, v_amount));
    END IF;

    UPDATE forms SET state = 'approved' WHERE form_id = v_form.form_id;
    UPDATE tasks SET done = true WHERE task_id = key::int;
END
$$;

-- Called once for each key when its item is final, whatever the outcome: the task
-- is no longer grey, and somebody may take it up by hand.
CREATE FUNCTION unlock_task(key text) RETURNS void
LANGUAGE sql SET search_path = approval, pg_temp AS $$
    UPDATE tasks SET locked = false WHERE task_id = key::int
$$;

-- Called once per batch and run, when nothing is left to do: write the report, and
-- tell the approver.
CREATE FUNCTION report_batch(batch_id bigint, run_no int) RETURNS void
LANGUAGE plpgsql SET search_path = approval, pg_temp AS $$
DECLARE
    v_report reports;
BEGIN
    INSERT INTO reports AS r (batch_id, run_no, succeeded, ignored, failed)
    SELECT p.batch_id, report_batch.run_no, p.succeeded, p.ignored, p.failed
    FROM redrive.batch_progress AS p
    WHERE p.batch_id = report_batch.batch_id
    RETURNING r.* INTO v_report;
    PERFORM redrive.send('approval: message', jsonb_build_object('to', 'approver', 'message',
        format('Run %s is finished: %s approved, %s not valid, %s failed.', v_report.run_no, v_report.succeeded, v_report.ignored, v_report.failed)));
    -- what is left to do by hand, in a message of its own a moment later; run_at => would name a time
    IF v_report.failed > 0 THEN
        PERFORM redrive.send('approval: message', jsonb_build_object('to', 'approver', 'message',
            (SELECT 'Please look at: ' || string_agg(format('task %s (%s)', f.key, f.message), ', ' ORDER BY f.key::int)
             FROM redrive.failed_items AS f
             WHERE f.batch_id = v_report.batch_id AND f.state = 'failed')), delay => '100 ms');
    END IF;
END
$$;

SELECT redrive.create_handler('approval: message', 'approval.send_message', isolation => 'item');
SELECT redrive.create_handler('approval: task', 'approval.approve_task',
    -- four attempts in all
    max_retries => 3,
    -- no delay of its own: failures wait for the pass retry_failed, which pg_cron calls each minute
    retry_delay => NULL,
    on_unlock => 'approval.unlock_task',
    on_finish => 'approval.report_batch');

-- What the web page calls when the approver has ticked some tasks: they turn grey,
-- and a batch is submitted, in the transaction of the page.  A task that is in another
-- batch is refused, with SQLSTATE 55P03.
CREATE FUNCTION approve_tasks(task_ids int[], approver text) RETURNS bigint
LANGUAGE sql SET search_path = approval, pg_temp AS $$
    UPDATE tasks SET locked = true WHERE task_id = ANY (task_ids);
    SELECT redrive.submit('approval: task',
        payloads => ARRAY(SELECT jsonb_build_object('approver', approver) FROM unnest(task_ids)),
        keys => task_ids::text[],
        label => format('%s approves %s tasks', approver, cardinality(task_ids)))
$$;
