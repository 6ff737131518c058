# The report in a browser: no errors, nothing wider than the window, a phone or paper, readable colours, landmarks.
# Fails if a value of users is put in as it is, if a column may grow without a scroll bar, or a colour gets paler.
use strict;
use warnings;

use IPC::Run;
use List::Util qw(max min);
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use RedriveTest;
use Test::More;

my ($browser) = grep { -x $_ } '/usr/bin/chromium', '/usr/bin/chromium-browser';
plan skip_all => 'chromium is not installed' unless $browser;

my $node = new_node('report');
$node->safe_psql('postgres', <<'SQL');
CREATE FUNCTION approve(payload jsonb) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF payload ->> 'n' = '3' THEN
        RAISE EXCEPTION '<script>console.error("from a message")</script><img src="x">%', repeat('wide', 200);
    ELSIF payload ->> 'n' = '4' THEN
        PERFORM redrive.raise_validation('not valid');
    END IF;
END
$$;
SELECT redrive.create_handler('approve_with_quite_a_long_name', 'approve');
SELECT redrive.submit_query('approve_with_quite_a_long_name', 'SELECT NULL::text, jsonb_build_object(''n'', n) FROM generate_series(1, 50) AS n', label => 'first');
SELECT redrive.submit_query('approve_with_quite_a_long_name', 'SELECT NULL::text, ''{}''::jsonb FROM generate_series(1, 50)', label => 'tomorrow', run_at => now() + interval '1 day');
SELECT redrive.rescue_stale();
BEGIN;
SELECT redrive.create_platform('<script>console.error("from a name")</script>' || repeat('wide', 10), 'https://crm.example/');
SELECT redrive.create_platform('erp', 'https://erp.example/');
SELECT redrive.pause_platform(name) FROM redrive.platforms;
COMMIT;
SELECT count(redrive.record_task('form ' || n, 'done')) FROM generate_series(1, 30) AS n;
UPDATE redrive.platform_states SET breaker = 'open', reason = 'it answers <b>503</b>', blocked_until = now() + interval '1 min';
INSERT INTO redrive.push_log (part, push_id, attempt_no, platform_id, version, started_at, finished_at, delivered, charged, is_probe)
SELECT r.part, push_id, 1, platform_id, 1, now(), now() - push_id * interval '10 min', push_id % 3 > 0, push_id % 2 = 0, false FROM redrive.pushes CROSS JOIN redrive.rotation AS r;
SQL
ok( poll_until($node, "SELECT succeeded = 48 FROM redrive.batch_progress WHERE label = 'first'"), 'a batch has run');

my $dir = PostgreSQL::Test::Utils::tempdir;
my $page = $node->safe_psql('postgres', 'SELECT redrive.report_html()');
ok(index($page, 'wide' x 50) > 0, 'the message of the user is in it');
like($page, qr/&lt;script&gt;console.error\("from a name"\)/, 'and the name of a platform');
like($page, qr/<section id="pushes"/, 'and a chart of pushes');

# run the browser on a page; return what it printed and what it said
sub browse
{
	my ($file, @options) = @_;
	my ($out, $err) = ('', '');
	local $ENV{HOME} = $dir;

	IPC::Run::run([ $browser, '--headless=new', '--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage', "--user-data-dir=$dir/profile",
			'--enable-logging=stderr', @options, "file://$file" ], '<', \undef, '>', \$out, '2>', \$err, IPC::Run::timeout(120));
	return ($out, join("\n", grep { /CONSOLE|Uncaught|Refused/ } split /\n/, $err));
}

# Show a page in a frame of a width, as on a phone, which no window is as narrow as; the frame measures what is in it.
sub show
{
	my ($name, $width, $page) = @_;
	my %escape = ('&' => '&amp;', '"' => '&quot;');
	my $measure = 'const d = this.contentDocument.documentElement, s = document.documentElement.dataset;'
	  . "s.wide = d.scrollWidth + ' of ' + this.contentWindow.innerWidth; s.back = getComputedStyle(d.ownerDocument.body).backgroundColor;"
	  . "s.loaded = this.contentWindow.performance.getEntriesByType('resource').length";
	my $file = "$dir/$name.html";

	append_to_file($file, "<!DOCTYPE html><meta charset=\"utf-8\"><body style=\"margin: 0\"><iframe style=\"border: 0; width: ${width}px; height: 3000px\" onload=\"$measure\" srcdoc=\""
		  . ($page =~ s/([&"])/$escape{$1}/gr) . '"></iframe>');
	my ($dom, $said) = browse($file, '--dump-dom', '--window-size=1400,3000');
	my ($wide, $window) = $dom =~ /data-wide="(\d+) of (\d+)"/;
	is($window, $width, "$name is shown") or diag(substr($dom, 0, 500));
	is($said, '', "$name: no message of the browser");
	cmp_ok($wide // 1e6, '<=', $width, "$name: nothing is wider than $width pixels");
	like($dom, qr/data-loaded="0"/, "$name: nothing is loaded");
	return $dom;
}

append_to_file("$dir/wrong.html", '<script>console.error("a message")</script>');
like((browse("$dir/wrong.html", '--dump-dom'))[1], qr/a message/, 'a message of the browser would be seen');
show('a screen', 1280, $page);
show('a phone', 360, $page);
# what is for paper and for the dark, on the screen: A4 has 700 pixels between its margins
show('paper', 700, $page =~ s/\@media print/\@media all/r);
like(show('the dark', 500, $page =~ s/\@media \(prefers-color-scheme: dark\)/\@media all/r), qr/data-back="rgb\(13, 17, 23\)"/, 'the dark: it is dark');
foreach my $name ('a screen', 'a phone', 'paper', 'the dark')
{
	browse("$dir/$name.html", "--screenshot=$dir/$name.png", '--window-size=1400,3000');
	cmp_ok(-s "$dir/$name.png" // 0, '>', 10_000, "$name: a picture of it");
}

# Landmarks, and names for what is not text.
my $count = sub { my @found = $page =~ /$_[0]/g; return scalar @found };
is($count->('<(header|main|footer)>') . $count->('<h1>'), '31', 'header, main, footer and one title');
is($count->('<section id="(\w+)" aria-labelledby="\1-title"><h2 id="\1-title">'), $count->('<section'), 'each section is named by its heading');
is($count->('<svg [^>]*role="img" aria-label="[^"]+"'), $count->('<svg'), 'each chart has a name');
is($count->('class="scroll" tabindex="0" role="region" aria-label='), $count->('class="scroll"'), 'what scrolls can be reached by the keyboard');
my @names = $page =~ /role="region" aria-label="([^"]+)"/g;
my %names = map { $_ => 1 } @names;
is(keys %names, @names, 'and has a name of its own');
is($count->('<(a|link|script|img|iframe|object|embed|form)\b'), 0, 'no element that could load or send something');

# Contrast of the text with what is behind it, by the formula of WCAG 2: at least 4.5, 3 for the colours of charts.
sub luminance
{
	my @c = map { hex($_) / 255 } ($_[0] =~ /^#(..)(..)(..)$/) ? ($1, $2, $3) : map { "$_$_" } $_[0] =~ /^#(.)(.)(.)$/;
	my ($r, $g, $b) = map { $_ <= 0.03928 ? $_ / 12.92 : (($_ + 0.055) / 1.055)**2.4 } @c;

	return 0.2126 * $r + 0.7152 * $g + 0.0722 * $b;
}

my @schemes = $page =~ /:root \{([^}]*)\}/g;
is(scalar @schemes, 2, 'a light and a dark scheme');
foreach my $scheme (@schemes)
{
	my %colour = $scheme =~ /--(\w+): (#[0-9a-f]+)/g;
	my @poor;

	foreach my $pair ([qw(fore back 4.5)], [qw(soft back 4.5)], [qw(fore card 4.5)], [qw(bad card 4.5)], map { [ $_, 'back', 3 ] } qw(s1 s2 s3 s4))
	{
		my ($l1, $l2) = map { luminance($colour{$_}) } @$pair[0, 1];
		my $contrast = (max($l1, $l2) + 0.05) / (min($l1, $l2) + 0.05);
		push @poor, sprintf('%s on %s: %.2f', @$pair[0, 1], $contrast) if $contrast < $pair->[2];
	}
	is(join(', ', @poor), '', 'colours can be told apart');
}

$node->stop;
done_testing();
