-- HTTP from SQL: a request that is tried a bounded number of times.

CREATE TYPE redrive.http_result AS (ok boolean, status int, body text, attempts int, error text);
COMMENT ON TYPE redrive.http_result IS 'What came of http_request(): ok = the answer was 2xx; status and body of the last answer, NULL = none; error in words';

CREATE FUNCTION redrive.http_request(
    method text, url text, body text DEFAULT NULL, headers jsonb DEFAULT '{}', max_attempts int DEFAULT 3, timeout interval DEFAULT '5 s',
    retry_delay interval DEFAULT '1 s') RETURNS redrive.http_result
LANGUAGE c VOLATILE AS 'MODULE_PATHNAME', 'redrive_http_request';
COMMENT ON FUNCTION redrive.http_request IS
'Send a request, at most max_attempts times retry_delay apart (or as long as the answer asks, up to 60 s), and return what came of it; it never raises for what the network does. ok = the status was 2xx; error says in words why not. timeout is that of one attempt. It is tried again after failures of the network, 408, 425, 429 and 5xx. Only https, and only addresses of the public network; redrive.http_allow_cidr opens others, also for http. No redirects, no proxy, no cookies. At most 64 kB of the answer are kept. The body goes out in UTF-8. Host, status and attempts are kept in redrive.http_log, unless the call is cancelled or its transaction rolled back. Not granted by grant_user: GRANT EXECUTE to who may call outside. Errors: 22004 NULL, 22023 invalid argument, 25006 read-only transaction or standby, 53000 no descriptors.';
