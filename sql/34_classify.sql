-- Classification: rules are data.

INSERT INTO redrive.classification_rules (priority, sqlstate_pattern, error_class, action, builtin) VALUES
    (0, 'RD001', 'validation', 'ignore', true),
    (0, 'RD002', 'user_error', 'retry', true),
    (0, '40001', 'transient', 'retry_free', true),
    (0, '40P01', 'transient', 'retry_free', true),
    (0, '55P03', 'transient', 'retry_free', true),
    (0, '57014', 'timeout', 'retry', true),
    (0, '23503', 'missing_parent', 'retry', true),
    (0, '0A000', 'defect', 'pause', true),
    (0, '53%', 'infrastructure', 'retry_free', true),
    (0, '57P%', 'infrastructure', 'retry_free', true),
    (0, '58%', 'infrastructure', 'retry_free', true),
    (0, '08%', 'infrastructure', 'retry_free', true),
    (0, '22%', 'data', 'fail', true),
    (0, '23%', 'data', 'fail', true),
    (0, '42%', 'defect', 'pause', true),
    (0, NULL, 'other', 'retry', true);

-- room for builtin rules of later versions
ALTER TABLE redrive.classification_rules ALTER COLUMN rule_id RESTART WITH 1000;

-- The rule for an error, and whether the same rule holds for every message
-- with this SQLSTATE and constraint (then a worker need not ask again).
CREATE FUNCTION redrive._classify(p_handler text, p_sqlstate text, p_message text, p_constraint text)
RETURNS TABLE (rule_id int, error_class text, action redrive.rule_action, for_all_messages boolean)
LANGUAGE sql STABLE AS $$
    WITH fitting AS (
        SELECT r.*
        FROM redrive.classification_rules AS r
        WHERE r.enabled
          AND (r.handler IS NULL OR r.handler = p_handler)
          AND (r.sqlstate_pattern IS NULL OR p_sqlstate LIKE r.sqlstate_pattern)
          AND (r.constraint_name IS NULL OR r.constraint_name = p_constraint)
    )
    SELECT r.rule_id, r.error_class, r.action, NOT EXISTS (SELECT FROM fitting WHERE message_pattern IS NOT NULL)
    FROM fitting AS r
    WHERE r.message_pattern IS NULL OR p_message ~ r.message_pattern
    ORDER BY r.priority DESC, (r.handler IS NOT NULL) DESC, (r.message_pattern IS NOT NULL) DESC, (r.constraint_name IS NOT NULL) DESC,
        length(rtrim(r.sqlstate_pattern, '%')) DESC NULLS LAST, r.rule_id
    LIMIT 1
$$;

-- Rules of a handler are its owner's: they name constraints and messages.
CREATE FUNCTION redrive._classify(p_caller oid, p_handler text, p_sqlstate text, p_message text, p_constraint text,
    OUT error_class text, OUT action redrive.rule_action, OUT rule text)
LANGUAGE plpgsql STABLE AS $$
BEGIN
    IF EXISTS (SELECT FROM redrive.handlers WHERE name = p_handler) THEN
        PERFORM redrive._handler(p_caller, p_handler);
    END IF;
    SELECT c.error_class, c.action,
        concat_ws(', ', 'rule ' || r.rule_id, 'handler ' || r.handler, 'priority ' || nullif(r.priority, 0),
            'sqlstate ' || r.sqlstate_pattern, 'constraint ' || r.constraint_name, 'message ~ ' || quote_literal(r.message_pattern))
    INTO error_class, action, rule
    FROM redrive._classify(p_handler, p_sqlstate, coalesce(p_message, ''), p_constraint) AS c
    JOIN redrive.classification_rules AS r ON r.rule_id = c.rule_id;
END
$$;

CREATE FUNCTION redrive.classify(handler text, sqlstate text, message text DEFAULT '', constraint_name text DEFAULT NULL,
    OUT error_class text, OUT action redrive.rule_action, OUT rule text)
LANGUAGE c STABLE AS 'MODULE_PATHNAME', 'redrive_as_owner';
COMMENT ON FUNCTION redrive.classify IS
'Explain what would be done about an error: its class, the action, and the rule that decides. Order of rules: priority, then those for one handler, then with a message pattern, then with a constraint, then the longest SQLSTATE pattern. Errors: 42501 the handler is not yours.';

CREATE FUNCTION redrive.raise_validation(message text, detail text DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_raise_validation';
COMMENT ON FUNCTION redrive.raise_validation IS
'For handlers: raise SQLSTATE RD001, by default classified as validation and ignored.';

CREATE FUNCTION redrive.raise_user_error(message text, detail text DEFAULT NULL) RETURNS void
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_raise_user_error';
COMMENT ON FUNCTION redrive.raise_user_error IS
'For handlers: raise SQLSTATE RD002, by default classified as user_error and retried.';
