-- The application: forms to be approved, a to-do task for each, and the money
-- that approving takes.  Nothing in here knows of pg_redrive.

-- Each approved form takes its amount from a cost centre.
CREATE TABLE cost_centers (
    code text PRIMARY KEY,
    budget numeric NOT NULL,
    spent numeric NOT NULL DEFAULT 0
);

-- What an applicant has filled in, as it came from the web page.
CREATE TABLE forms (
    form_id int PRIMARY KEY,
    applicant text NOT NULL,
    state text NOT NULL DEFAULT 'submitted' CHECK (state IN ('submitted', 'withdrawn', 'approved')),
    fields jsonb NOT NULL
);

-- What an approver finds in the to-do list.  A locked task is shown in grey:
-- somebody has ticked it, and the batch is not done with it.
CREATE TABLE tasks (
    task_id int PRIMARY KEY,
    form_id int NOT NULL REFERENCES forms,
    assignee text NOT NULL,
    done boolean NOT NULL DEFAULT false,
    locked boolean NOT NULL DEFAULT false
);

-- What was spent.  Without a unique constraint, so that a form that is approved
-- twice would show.
CREATE TABLE bookings (
    form_id int NOT NULL REFERENCES forms,
    cost_center text NOT NULL CONSTRAINT bookings_cost_center REFERENCES cost_centers,
    amount numeric NOT NULL,
    approved_by text NOT NULL
);

-- Messages that have left the house.
CREATE TABLE sent_messages (
    recipient text NOT NULL,
    message text NOT NULL,
    sent_at timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- One line per batch and run, for the page "my batches".
CREATE TABLE reports (
    batch_id bigint,
    run_no int,
    succeeded bigint,
    ignored bigint,
    failed bigint,
    PRIMARY KEY (batch_id, run_no)
);
