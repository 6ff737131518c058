-- Forms of the demo, whose states are pushed to two platforms of this machine.
CREATE TABLE form (form_no text PRIMARY KEY, state text NOT NULL);
SELECT redrive.create_platform(name, url, retry_interval => '2 s', max_retries => 5, allow_http => true)
FROM (VALUES ('crm', :'crm'), ('erp', :'erp')) AS p (name, url);
SELECT redrive.attach_task_source('form', 'form_no', 'state');
