/*-------------------------------------------------------------------------
 *
 * guc.c
 *	  Settings of pg_redrive, in alphabetical order.
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <limits.h>

#include "nodes/pg_list.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/varlena.h"

#include "base/address.h"
#include "base/guc.h"

/* Should batches run at all in this cluster? */
bool		redrive_enabled = true;

/* Private ranges that http_request() may reach. */
char	   *redrive_http_allow_cidr = NULL;

/* Which certificates are trusted; empty = those of the system. */
char	   *redrive_http_ca_file = NULL;

/* Ports of the public network that requests may go to, and the same as bits. */
char	   *redrive_http_ports = NULL;
static uint8 listed_ports[(PG_UINT16_MAX + 1) / 8];

/* How many databases of the cluster may use pg_redrive at once? */
int			redrive_max_databases = 16;

/* How many executors may run at once in the cluster? */
int			redrive_max_workers = 4;

/* How many pushes may be under way at once in a database? */
int			redrive_push_max_in_flight = 128;

/* How long may one scheduled pass take? */
int			redrive_pass_time_budget = 20;

/* When does an executor without work go away? */
int			redrive_worker_idle_timeout = 60000;

/* Check hook: a list of address ranges. */
static bool
check_ranges(char **value, void **extra, GucSource source)
{
	char	   *copy = pstrdup(*value);
	List	   *ranges;
	ListCell   *lc;

	if (!SplitGUCList(copy, ',', &ranges))
	{
		GUC_check_errdetail("It is not a list separated by commas.");
		return false;
	}
	foreach(lc, ranges)
	{
		RedriveAddressRange range;

		if (!redrive_parse_range(lfirst(lc), &range))
		{
			GUC_check_errdetail("\"%s\" is not a range of addresses like 10.0.0.0/8.", (char *) lfirst(lc));
			return false;
		}
	}
	return true;
}

/* Check hook: a list of ports. */
static bool
check_ports(char **value, void **extra, GucSource source)
{
	char	   *copy = pstrdup(*value);
	List	   *ports;
	ListCell   *lc;

	if (!SplitGUCList(copy, ',', &ports))
	{
		GUC_check_errdetail("It is not a list separated by commas.");
		return false;
	}
	foreach(lc, ports)
	{
		char	   *text = lfirst(lc);
		char	   *end;
		long		port = strtol(text, &end, 10);

		if (*text < '0' || *text > '9' || *end != '\0' || port < 1 || port > PG_UINT16_MAX)
		{
			GUC_check_errdetail("\"%s\" is not a port, a number from 1 to 65535.", text);
			return false;
		}
	}
	return true;
}

/* Assign hook: read the list, which was checked. */
static void
assign_ports(const char *value, void *extra)
{
	const char *at = value + strcspn(value, "0123456789");

	memset(listed_ports, 0, sizeof(listed_ports));
	while (*at != '\0')
	{
		char	   *end;
		long		port = strtol(at, &end, 10);

		listed_ports[port / 8] |= 1 << port % 8;
		at = end + strcspn(end, "0123456789");
	}
}

/* May requests go to this port of the public network? */
bool
redrive_port_listed(int port)
{
	return port > 0 && port <= PG_UINT16_MAX && (listed_ports[port / 8] & 1 << port % 8) != 0;
}

/*
 * Define all settings.
 *
 * max_databases sizes shared memory and so exists only when preloading;
 * called once per process from _PG_init.
 */
void
redrive_define_settings(bool preloading)
{
	DefineCustomBoolVariable("redrive.enabled",
							 "Runs batches in this cluster.",
							 "When off, executors stop after their commit interval, nothing is claimed, and passes do nothing.",
							 &redrive_enabled, true,
							 PGC_SIGHUP, 0, NULL, NULL, NULL);

	DefineCustomStringVariable("redrive.http_allow_cidr",
							   "Lists address ranges outside of the public network that http_request() may reach.",
							   "Separated by commas. Addresses of metadata services are never reached.",
							   &redrive_http_allow_cidr, "",
							   PGC_SUSET, GUC_LIST_INPUT, check_ranges, NULL, NULL);

	DefineCustomStringVariable("redrive.http_ca_file",
							   "Sets the file with the certificates that are trusted.",
							   "Empty means those that the system trusts.",
							   &redrive_http_ca_file, "",
							   PGC_SIGHUP, 0, NULL, NULL, NULL);

	DefineCustomStringVariable("redrive.http_ports",
							   "Lists the ports of the public network that pushes and http_request() may reach.",
							   "Separated by commas. Ranges that were opened are open on all their ports.",
							   &redrive_http_ports, "80, 443",
							   PGC_SUSET, GUC_LIST_INPUT, check_ports, assign_ports, NULL);

	if (preloading)
		DefineCustomIntVariable("redrive.max_databases",
								"Sets the number of databases that can have workers.",
								NULL,
								&redrive_max_databases, 16, 1, 1000,
								PGC_POSTMASTER, 0, NULL, NULL, NULL);

	DefineCustomIntVariable("redrive.max_workers",
							"Sets the number of executors in the cluster.",
							"0 means none. Each takes one of max_worker_processes.",
							&redrive_max_workers, 4, 0, 128,
							PGC_SIGHUP, 0, NULL, NULL, NULL);

	DefineCustomIntVariable("redrive.pass_time_budget",
							"Sets the time after which a scheduled pass leaves the rest to the next one.",
							NULL,
							&redrive_pass_time_budget, 20, 1, 3600,
							PGC_USERSET, GUC_UNIT_S, NULL, NULL, NULL);

	DefineCustomIntVariable("redrive.push_max_in_flight",
							"Sets the number of pushes that may be under way at once in a database.",
							"Each needs a file descriptor.",
							&redrive_push_max_in_flight, 128, 1, 10000,
							PGC_SIGHUP, 0, NULL, NULL, NULL);

	DefineCustomIntVariable("redrive.worker_idle_timeout",
							"Sets the time after which an executor without work exits.",
							NULL,
							&redrive_worker_idle_timeout, 60000, 0, INT_MAX,
							PGC_SIGHUP, GUC_UNIT_MS, NULL, NULL, NULL);

	MarkGUCPrefixReserved("redrive");
}

/*
 * Let a background worker take the signals for a reload and for its end, the latter with
 * this handler.  What was reloaded while the server was starting it, it could not know:
 * so it shall read the settings again.
 */
void
redrive_take_signals(pqsigfunc on_terminate)
{
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	pqsignal(SIGTERM, on_terminate);
	BackgroundWorkerUnblockSignals();
	ConfigReloadPending = true;
}
