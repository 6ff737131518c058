-- The same for very many tasks at once, of forms so small that no budget is asked: a
-- set handler gets up to thousands of them in one call, does the work with a few
-- statements, and says which it did not do.
CREATE FUNCTION approve_task_set(items redrive.item[]) RETURNS SETOF redrive.outcome
LANGUAGE plpgsql SET search_path = approval, pg_temp AS $$
BEGIN
    -- Two calls that lock the same rows lock them in the same order.
    PERFORM FROM forms AS f
    WHERE f.form_id IN (SELECT t.form_id FROM tasks AS t JOIN unnest(items) AS i ON t.task_id = i.key::int)
    ORDER BY f.form_id
    FOR UPDATE;

    -- What is not valid is said by an outcome, and costs nothing.
    RETURN QUERY
    SELECT i.item_no, 'ignored'::redrive.outcome_kind, format('form %s is %s', f.form_id, f.state), 'RD001', NULL::interval
    FROM unnest(items) AS i
    JOIN tasks AS t ON t.task_id = i.key::int
    JOIN forms AS f ON f.form_id = t.form_id
    WHERE f.state <> 'submitted';

    -- What goes wrong here raises an error; the engine finds the tasks that it comes from.
    WITH approved AS (
        UPDATE forms AS f SET state = 'approved'
        FROM unnest(items) AS i
        JOIN tasks AS t ON t.task_id = i.key::int
        WHERE f.form_id = t.form_id AND f.state = 'submitted'
        RETURNING f.form_id, f.applicant, f.fields, i.payload, t.task_id
    ), ticked AS (
        UPDATE tasks AS t SET done = true FROM approved AS a WHERE t.task_id = a.task_id
    ), paid AS (
        UPDATE cost_centers AS c SET spent = c.spent + s.amount
        FROM (SELECT a.fields ->> 'cost_center' AS code, sum((a.fields ->> 'amount')::numeric) AS amount FROM approved AS a GROUP BY 1) AS s
        WHERE c.code = s.code
    )
    INSERT INTO bookings (form_id, cost_center, amount, approved_by)
    SELECT a.form_id, a.fields ->> 'cost_center', (a.fields ->> 'amount')::numeric, a.payload ->> 'approver'
    FROM approved AS a;
END
$$;
SELECT redrive.create_handler('approval: many', 'approval.approve_task_set', 'set', on_unlock => 'approval.unlock_task');
