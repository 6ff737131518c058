# http_request(), and TLS: what the network does is an answer and not an error, attempts and time are bounded, it can be cancelled,
# and certificates are verified.
#
# Seen red: with CURLOPT_SSL_VERIFYHOST 0 or CURLOPT_SSL_VERIFYPEER 0.
use strict;
use warnings;

use FindBin;
use IPC::Run;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use PushTest;
use RedriveTest;
use Test::More;

my $node = new_node('http', conf => "redrive.http_allow_cidr = '127.0.0.0/8'\n");
my $receiver = start_receiver();
my $url = "http://127.0.0.1:$receiver->{port}";

# Return what came of a request; the arguments as SQL.
sub request
{
	my ($arguments, $what) = @_;

	$what //= "concat_ws(' ', ok, coalesce(status::text, 'none'), attempts, error)";
	return $node->safe_psql('postgres', "SELECT $what FROM redrive.http_request($arguments)");
}

# Attempts are bounded, and only what may pass is tried again.
my $at_once = "retry_delay => '0'";
is(request("'GET', '$url/first/1', $at_once"), 't 200 2', 'tried again after 500');
is(request("'GET', '$url/status/500', $at_once"), 'f 500 3 the answer was 500', '500: three attempts');
is(scalar(received($receiver, '/status/500')), 3, '... that arrived');
is(request("'GET', '$url/status/404', $at_once"), 'f 404 1 the answer was 404', '404: one attempt');
is(request("'GET', '$url/redirect', $at_once"), 'f 302 1 the answer was 302', 'a redirect is not followed');
is(request("'POST', '$url/ok', 'a body', '{\"X-Token\": \"secret-token\"}'"), 't 200 1', 'POST');
my ($post) = received($receiver, '/ok');
is("$post->{method} $post->{body} $post->{headers}{'x-token'}", 'POST a body secret-token', 'method, body and header');
like(request("'GET', '$url/delay/30', max_attempts => 2, timeout => '100 ms', $at_once"), qr/^f none 2 time-out after \d+ ms, waiting for the answer$/, 'time-out');
like(request("'GET', '$url/drip', max_attempts => 1, timeout => '100 ms'"), qr/^f 200 1 time-out after \d+ ms, reading the answer$/, 'time-out in the answer');
like(request("'GET', '$url/crawl', max_attempts => 1, timeout => '100 ms'"), qr/^f 200 1 time-out after \d+ ms, reading the answer$/, 'time-out in its headers');
like(request("'GET', '$url/reset', max_attempts => 2, $at_once"), qr/^f none 2 .+/, 'a reset connection');
like(request("'GET', 'http://127.0.0.1:1/', max_attempts => 2, $at_once"), qr/^f none 2 .*connect/, 'nobody listens');
like(request("'GET', 'https://nowhere.invalid/', max_attempts => 1, timeout => '500 ms'"), qr/^f none 1 .+/, 'no such name');
is(request("'GET', '$url/header', max_attempts => 1"), 'f 200 1 the headers of the answer are too long', 'a header without end');
is(request("'GET', '$url/status/1', max_attempts => 1"), 'f none 1 the answer is not HTTP', 'no status of HTTP');
is(request("'GET', '$url/huge', max_attempts => 1", 'ok, length(body)'), 't|65536', 'of a huge answer the begin is kept');
is(request("'GET', '$url/bytes', max_attempts => 1", "ok, body ~ '^a'"), 't|t', 'bytes that are no text');

# Which addresses may be asked.
foreach my $address ('https://10.0.0.1', 'https://[::1]', 'https://169.254.169.254', 'https://0x0a000001', 'https://[::ffff:10.0.0.1]')
{
	is(request("'GET', '$address/', $at_once"), 'f none 1 the address is not of the public network and not allowed', "$address is refused");
}
is(request("'GET', 'http://8.8.8.8/', $at_once"), 'f none 1 http is only for addresses of redrive.http_allow_cidr, others need https', 'http://8.8.8.8 is refused');

# It can be cancelled: while it waits for the answer, and between attempts.
foreach my $case ([ '/delay/3000', '' ], [ '/status/503', ", retry_delay => '30 min'" ])
{
	my ($path, $more) = @$case;
	my ($out, $err) = ('', '');
	my $before = received($receiver, $path);
	my $session = IPC::Run::start([ 'psql', '-XAt', '-d', $node->connstr('postgres'), '-c', "SELECT redrive.http_request('GET', '$url$path', timeout => '30 min'$more) /* waits */" ],
		'<', \undef, '>', \$out, '2>', \$err, IPC::Run::timeout(60));

	ok(wait_for_request($receiver, $path, $before + 1), "$path: it waits");
	is($node->safe_psql('postgres', "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE query ~ '/[*] waits [*]/\$'"), 1, "$path: cancel");
	$session->finish;
	like($err, qr/canceling statement due to user request/, "$path: cancelled");
}

# A body is sent in UTF-8, whatever the encoding of the database.
$node->safe_psql('postgres', "CREATE DATABASE latin ENCODING 'WIN1252' LOCALE 'C' TEMPLATE template0");
is($node->safe_psql('latin', "CREATE EXTENSION pg_redrive; SELECT ok FROM redrive.http_request('POST', '$url/latin', chr(228) || ' ' || chr(128) || chr(129) || '.')"), 't', 'POST from a database in another encoding');
is((received($receiver, '/latin'))[0]{body}, "\x{e4} \x{20ac}?.", '... arrives in UTF-8, as far as it can');

# What is kept: host and outcome, nothing else of the request.
is( $node->safe_psql('postgres', "SELECT count(*), count(*) FILTER (WHERE ok), bool_and(requested_by = current_user::regrole), min(host) FILTER (WHERE ok) FROM redrive.http_log"),
	"21|4|t|127.0.0.1:$receiver->{port}", 'each request is in the log');
unlike($node->safe_psql('postgres', 'SELECT l FROM redrive.http_log AS l'), qr/secret-token|a body|delay|crawl/, '... without path, header and body');

# Who may.
$node->safe_psql('postgres', "CREATE ROLE app; SELECT redrive.grant_user('app')");
is($node->safe_psql('postgres', "SELECT has_function_privilege('app', oid, 'EXECUTE') FROM pg_proc WHERE oid = 'redrive.http_request'::regproc"), 'f', 'users may not, before it is granted');
like((query($node, "SET ROLE app; SET redrive.http_allow_cidr = '0.0.0.0/0'"))[1], qr/permission denied/, 'and not open private networks');

# Ports of the public network: those that are listed.  Nothing is sent, as none of these is tried.
#
# Seen red: with redrive_port_listed() always true, in open_socket() the requests are tried; without the check hook
# the list of no ports is taken.
my $port_refused = qr/^f none 1 the port is not one of redrive.http_ports/;
like(request("'GET', 'https://1.1.1.1:8443/', $at_once"), $port_refused, 'a port that is not listed is refused');
like(request("'GET', 'https://[::ffff:101:101]:8443/', $at_once"), $port_refused, '... however the address is spelled');
like((query($node, "SET ROLE app; SET redrive.http_ports = '8443'"))[1], qr/permission denied/, 'users cannot list it');
$node->safe_psql('postgres', "ALTER SYSTEM SET redrive.http_ports = '8443'; SELECT pg_reload_conf()");
ok(poll_until($node, "SELECT current_setting('redrive.http_ports') = '8443'"), 'other ports are listed');
like(request("'GET', 'https://1.1.1.1/', $at_once"), $port_refused, 'now 443 is refused');
like((query($node, "ALTER SYSTEM SET redrive.http_ports = '$_'"))[1], qr/invalid value for parameter "redrive.http_ports"/, "\"$_\" is no list of ports")
  foreach ('0', '65536', 'https', '443 80', '-1');
like((query($node, "SELECT redrive.create_platform('far', 'https://1.1.1.1/hook')"))[1],
	qr/WARNING:  pushes to port 443 of the public network are refused\nDETAIL:  redrive.http_ports is "8443".\nHINT:  Ask a superuser/, 'who sets such a port is warned');
$node->safe_psql('postgres', "SELECT redrive.record_task('t', 'new')");
ok(poll_until($node, "SELECT state = 'blocked' AND message ~ 'the port is not one' FROM redrive.push_status WHERE platform = 'far'"), '... and a push there is blocked, and says so');
like((query($node, "SELECT redrive.alter_platform('far', url => 'https://1.1.1.1:9443/hook')"))[1], qr/WARNING:  pushes to port 9443 of the public network are refused/, 'who changes to one too');
is((query($node, "SELECT redrive.alter_platform('far', allow_cidr => '{1.1.1.1/32}')"))[1], '', '... but not for a range that is open on all ports');
$node->safe_psql('postgres', "SELECT redrive.drop_platform('far'); DELETE FROM redrive.tasks");
$node->safe_psql('postgres', "ALTER SYSTEM RESET redrive.http_ports; SELECT pg_reload_conf()");

# Certificates: one that is right, and one of the past.
my $dir = PostgreSQL::Test::Utils::tempdir;
append_to_file("$dir/ca.conf", "[ca]\ndefault_ca = d\n[d]\ndatabase = $dir/index\nnew_certs_dir = $dir\nrand_serial = yes\ndefault_md = sha256\npolicy = p\n[p]\ncommonName = supplied\n[ext]\nsubjectAltName = IP:127.0.0.1\n");
append_to_file("$dir/index", '');
my @new_key = ('-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes');
run_log([ 'openssl', 'req', '-x509', @new_key, '-keyout', "$dir/ca.key", '-out', "$dir/ca.pem", '-days', '2', '-subj', '/CN=CA of a test' ]) or die 'no CA';

# Make a certificate for 127.0.0.1; return a file with it and its key.
sub certificate
{
	my ($name, $from, $to) = @_;

	run_log([ 'openssl', 'req', @new_key, '-keyout', "$dir/$name.key", '-out', "$dir/$name.csr", '-subj', "/CN=$name" ]) or die 'no key';
	run_log([ 'openssl', 'ca', '-batch', '-notext', '-config', "$dir/ca.conf", '-extensions', 'ext', '-cert', "$dir/ca.pem", '-keyfile', "$dir/ca.key",
			'-in', "$dir/$name.csr", '-out', "$dir/$name.pem", '-startdate', $from, '-enddate', $to ]) or die 'no certificate';
	append_to_file("$dir/$name.both", slurp_file("$dir/$name.key") . slurp_file("$dir/$name.pem"));
	return "$dir/$name.both";
}
my $right = start_receiver(undef, certificate('right', '20200101000000Z', '21000101000000Z'));
my $expired = start_receiver(undef, certificate('expired', '20200101000000Z', '20200102000000Z'));
my $tls_error = qr/^f none 1 .*(SSL|certificate)/;
my $name_error = qr/^f none 1 .*(name|localhost)/;
my $expired_error = qr/^f none 1 .*expired/;

like(request("'GET', 'https://127.0.0.1:$right->{port}/ok', $at_once"), $tls_error, 'a certificate of a CA that is not trusted is refused');
$node->append_conf('postgresql.conf', "redrive.http_ca_file = '$dir/ca.pem'");
$node->reload;
ok(poll_until($node, "SELECT current_setting('redrive.http_ca_file') <> ''"), 'the CA is trusted');
is(request("'GET', 'https://127.0.0.1:$right->{port}/ok', $at_once"), 't 200 1', 'now it is accepted');
like(request("'GET', 'https://localhost:$right->{port}/ok', $at_once"), $name_error, 'not for another name');
like(request("'GET', 'https://127.0.0.1:$expired->{port}/ok', $at_once"), $expired_error, 'nor when it has expired');
is(scalar(received($right)) . ' ' . scalar(received($expired)), '1 0', 'to those nothing was sent');
# the pusher verifies them in the same way
my $open = "allow_cidr => '{127.0.0.0/8}'";
$node->safe_psql('postgres', "SELECT redrive.create_platform('right', 'https://127.0.0.1:$right->{port}/', $open), redrive.create_platform('name', 'https://localhost:$right->{port}/', $open),
	redrive.create_platform('expired', 'https://127.0.0.1:$expired->{port}/', $open); SELECT redrive.record_task('task', 'done')");
ok( poll_until($node, "SELECT string_agg(platform || ' ' || state || ' ' || coalesce(error_class, '') || retry_count, ', ' ORDER BY platform) FROM redrive.pushes AS u JOIN (SELECT platform_id, name AS platform FROM redrive.platforms) AS p ON p.platform_id = u.platform_id",
		'expired waiting tls0, name waiting tls0, right delivered 0'),
	'pushes: only the right one is delivered, the others cost no retries');
is(scalar(received($right)) . ' ' . scalar(received($expired)), '2 0', 'to the others nothing was sent');
like($node->safe_psql('postgres', "SELECT message FROM redrive.push_status WHERE platform = 'expired'"), qr/expired/, 'it is said why');

my $lookup_library = "$dir/lookup.so";
my $have_lookup = system("cc -shared -fPIC -o $lookup_library $FindBin::Bin/../lookup.c -ldl 2>&1") == 0;

# A name is judged by the address that the socket is opened to, not by one that it had before.
#
# Seen red: with redrive_judge_address() in open_socket()
# (src/base/http_transfer.c) always VERDICT_ALLOWED.
SKIP:
{
	skip 'no compiler, for a library that says what a name resolves to', 8 unless $have_lookup;

	my $name = "http://rebind.test:$receiver->{port}";
	my $resolve = sub {
		append_to_file("$dir/addresses", join('', map { "$_\n" } @_));
		rename("$dir/addresses", "$dir/names/rebind.test") or die $!;
	};
	mkdir "$dir/names" or die $!;
	$resolve->('127.0.0.1');
	my $named = new_node('named', start => 0, conf => "redrive.http_allow_cidr = '127.0.0.1/32'\n");
	{
		local $ENV{LD_PRELOAD} = join ' ', grep { length } $ENV{LD_PRELOAD} // '', $lookup_library;
		local $ENV{LOOKUP_NAMES} = "$dir/names";
		$named->start;
	}
	$named->safe_psql('postgres', 'CREATE EXTENSION pg_redrive');
	my $ask = sub { $named->safe_psql('postgres', "SELECT concat_ws(' ', ok, coalesce(status::text, 'none'), error) FROM redrive.http_request('GET', '$name/$_[0]', max_attempts => 1)") };
	my $refused = 'f none the address is not of the public network and not allowed';

	is($ask->('named'), 't 200', 'a name that may be asked');
	$resolve->('127.0.0.2');
	is($ask->('moved'), $refused, '... has another address now: refused');
	$resolve->('169.254.169.254');
	is($ask->('metadata'), $refused, '... or that of a metadata service');
	$resolve->('127.0.0.2', '127.0.0.1');
	is($ask->('both'), 't 200', 'of two addresses the one that is allowed');

	# the pusher has resolved the name before, and keeps connections
	$resolve->('127.0.0.1');
	$named->safe_psql('postgres', "SELECT redrive.create_platform('p', '$name/push', allow_http => true, allow_cidr => '{127.0.0.1/32}', retry_interval => '50 ms'), redrive.record_task('task', 'one')");
	ok(wait_for_request($receiver, '/push', 1), 'a push to the name');
	$resolve->('127.0.0.2');
	$named->safe_psql('postgres', "SELECT redrive.create_platform('q', '$name/q', allow_http => true, allow_cidr => '{127.0.0.3/32}'), redrive.record_task('task', 'two')");
	ok(poll_until($named, "SELECT state || ' ' || error_class FROM redrive.push_status WHERE platform = 'q'", 'blocked policy'), 'a platform that may not ask this address is refused, whatever connection is open');
	is(scalar(received($receiver, '/q')), 0, '... nothing was sent for it');
	is(scalar(received($receiver, qr{^/(moved|metadata)})), 0, 'nor to the addresses before');
	$named->stop;
}

# Other certificates under the same name are used after a reload: connections that are open do not count.
#
# Seen red: without redrive_http_reload() in reload_settings() (src/proc/pusher.c).
run_log([ 'openssl', 'req', '-x509', @new_key, '-keyout', "$dir/other.key", '-out', "$dir/other.pem", '-days', '2', '-subj', '/CN=another CA of a test' ]) or die 'no CA';
rename("$dir/other.pem", "$dir/ca.pem") or die $!;
$node->reload;
ok( poll_until($node, "SELECT redrive.record_task('task', clock_timestamp()::text) > 0 AND (SELECT state || error_class FROM redrive.push_status WHERE platform = 'right') = 'waitingtls'"),
	'a CA that was replaced in its file is not trusted');
# What is under way goes on with what it began with.
platform($node, $receiver, 'slow', '/delay/1');
ok(wait_for_request($receiver, '/delay/1', 1), 'a slow push');
$node->reload;
ok(poll_until($node, "SELECT state || ' ' || http_status FROM redrive.push_status WHERE platform = 'slow'", 'delivered 200'), '... is not disturbed by a reload');
is(scalar(received($receiver, '/delay/1')), 1, '... and sent once');

# However long answers are, the pusher does not grow: it has read each to 64 kB.
my $deliver = sub {
	my ($n, $status) = @_;

	$node->safe_psql('postgres', "SELECT count(redrive.record_task('huge ' || i, '$status')) FROM generate_series(1, $n) AS i");
	ok(poll_until($node, "SELECT count(*) FROM redrive.push_status WHERE platform = 'huge' AND state = 'delivered' AND task_key ~ 'huge' AND pushed_status = '$status'", $n), "$n huge answers");
	return private_kb($node->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'redrive pusher'"));
};
$node->safe_psql('postgres', 'SELECT redrive.drop_platform(name) FROM redrive.platforms');
platform($node, $receiver, 'huge', '/huge');
my $kb_before = $deliver->(20, 'first');
my $kb_after = $deliver->(200, 'second');
SKIP:
{
	skip 'memory cannot be measured here', 1 unless defined $kb_before;
	cmp_ok($kb_after - $kb_before, '<', 8192, 'kB that the pusher has grown by');
}

# What can never be sent is blocked at once, whoever has put it there.
$node->safe_psql('postgres', 'SELECT redrive.drop_platform(name) FROM redrive.platforms; DELETE FROM redrive.tasks');
$node->safe_psql('postgres', "SELECT redrive.create_platform(name, 'https://127.0.0.1/') FROM unnest(ARRAY['no https', 'no host']) AS name;
	UPDATE redrive.platforms SET config_version = config_version + 1, url = CASE name WHEN 'no host' THEN 'https:' ELSE 'http://127.0.0.1:$receiver->{port}/blocked' END");
platform($node, $receiver, 'large', '/large');
$node->safe_psql('postgres', "SELECT redrive.record_task('small', 'done'), redrive.record_task('large', 'done', to_jsonb(repeat('x', 1048576)))");
ok( poll_until($node, "SELECT string_agg(format('%s %s %s %s %s', platform, task_key, state, error_class, message), E'\\n' ORDER BY platform, task_key) FROM redrive.push_status",
		join "\n", 'large large blocked body The body is longer than 1 MiB.', 'large small delivered  ',
		map { ("$_ large blocked body The body is longer than 1 MiB.", "$_ small blocked policy the URL is not one that requests can be sent to") } 'no host', 'no https'),
	'blocked are a scheme that is not allowed, a URL without host and a body that is too long');
is(scalar(received($receiver, '/blocked')) . scalar(received($receiver, '/large')), '01', '... of which nothing was sent');
is($node->safe_psql('postgres', 'SELECT max(retry_count) FROM redrive.push_status'), 0, '... which costs nothing');

# Connections that are kept leave descriptors for others.
#
# Seen red: with 2 * http->n_transfers, whatever the number of descriptors, in add_pool() (src/base/http.c).
my $few = new_node('few', conf => "max_files_per_process = 100\nredrive.push_max_in_flight = 16\n");
$few->safe_psql('postgres', "SELECT redrive.create_platform('p' || i, 'https://not.yet/', allow_http => true, allow_cidr => '{127.0.0.1/32}') FROM generate_series(1, 16) AS i");
foreach my $round (1 .. 3)
{
	$few->safe_psql('postgres', "SELECT redrive.alter_platform('p' || i, url => 'http://host-$round-' || i || '.localhost:$receiver->{port}/many') FROM generate_series(1, 16) AS i; SELECT redrive.record_task('task', '$round')");
	ok(poll_until($few, "SELECT count(*) FROM redrive.push_status WHERE state = 'delivered' AND pushed_status = '$round'", 16), "16 hosts, round $round");
}
is($few->safe_psql('postgres', "SELECT count(*), max(message) FROM redrive.push_attempts"), '48|', '... each at once');
$few->stop;

# A name server that does not answer delays nobody, and nothing waits for it.
#
# Seen red: without CURLOPT_QUICK_EXIT in make_handle() (src/base/http_transfer.c), and with libcurl 8.20 or later without CURLMOPT_QUICK_EXIT in
# add_pool() (src/base/http.c).
SKIP:
{
	my $lookup = "$dir/lookup";

	skip 'no compiler, for a library whose lookups hang', 9 unless $have_lookup;
	append_to_file($lookup, '');
	my $slow = new_node('slow', start => 0);
	{
		local $ENV{LD_PRELOAD} = join ' ', grep { length } $ENV{LD_PRELOAD} // '', $lookup_library;
		local $ENV{LOOKUP_HANGS} = $lookup;
		$slow->start;
	}
	$slow->safe_psql('postgres', 'CREATE EXTENSION pg_redrive');
	# wait until a lookup begins, since the last time
	my $begins = sub { return wait_for_file("$lookup.begun") && unlink("$lookup.begun") };
	my $hanging = "redrive.http_request('GET', 'https://hanging.test/', max_attempts => 1";

	like($slow->safe_psql('postgres', "SELECT error FROM $hanging, timeout => '200 ms')"), qr/^time-out after \d+ ms, looking up the name$/, 'a request ends in time');
	ok($begins->(), '... its lookup began');
	my ($out, $err) = ('', '');
	my $session = IPC::Run::start([ 'psql', '-XAt', '-d', $slow->connstr('postgres'), '-c', "SELECT $hanging, timeout => '30 min') /* waits */" ], '<', \undef, '>', \$out, '2>', \$err, IPC::Run::timeout(120));
	ok($begins->(), 'a request with time');
	$slow->safe_psql('postgres', "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query ~ '/[*] waits [*]/\$'");
	$session->finish;
	like($err, qr/canceling statement due to user request/, '... can be cancelled');

	platform($slow, $receiver, 'good', '/good');
	$slow->safe_psql('postgres', "SELECT redrive.create_platform('hanging', 'https://hanging.test/', connect_timeout => '100 ms', retry_interval => '10 ms', max_retries => 0); SELECT redrive.record_task('task', 'one')");
	ok(poll_until($slow, "SELECT string_agg(state || coalesce(error_class, ''), ' ' ORDER BY platform) FROM redrive.push_status", 'delivered deadtimeout'), 'a push to such a name ends in time');
	unlink("$lookup.begun");
	$slow->safe_psql('postgres', "SELECT redrive.alter_platform('hanging', connect_timeout => '1 min', timeout => '1 min', lease => '2 min'), redrive.record_task('task', 'two')");
	ok(poll_until($slow, "SELECT string_agg(state::text, ' ' ORDER BY platform) FROM redrive.push_status", 'delivered in_flight'), 'one platform has its push while that of another waits');
	ok($begins->(), '... in its lookup');
	$slow->stop;
	ok(!-e "$lookup.ended", 'none of the lookups has ended meanwhile');
	# seen red: with a push that is given back taught to its platform (flow/push_result.c)
	unlike(slurp_file($slow->logfile), qr/terminated by signal/, 'what was not sent is given back, without a crash');
	unlink($lookup);
}

$node->stop;
stop_receiver($_) foreach $receiver, $right, $expired;
done_testing();
