/*
 * getaddrinfo() of which a test says what it finds, by LD_PRELOAD:
 *
 *   LOOKUP_NAMES    a directory; a name of which there is a file has the addresses that are its lines
 *   LOOKUP_HANGS    as long as there is this file, names with "hanging" in them are looked for.  Makes LOOKUP_HANGS.begun and
 *                   LOOKUP_HANGS.ended.  After a minute it gives up.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef int (*Lookup) (const char *, const char *, const struct addrinfo *, struct addrinfo **);

static void
note(const char *file, const char *what)
{
	char		path[1000];

	snprintf(path, sizeof(path), "%s.%s", file, what);
	close(open(path, O_CREAT | O_WRONLY, 0666));
}

/* The addresses of a file, one after the other as they stand there. */
static int
lookup_in(FILE *file, Lookup real, const char *service, const struct addrinfo *hints, struct addrinfo **result)
{
	struct addrinfo **last = result;
	char		address[100];

	*result = NULL;
	while (fscanf(file, "%99s", address) == 1)
		if (real(address, service, hints, last) == 0)
			while (*last != NULL)
				last = &(*last)->ai_next;
	return *result != NULL ? 0 : EAI_NONAME;
}

int
getaddrinfo(const char *node, const char *service, const struct addrinfo *hints, struct addrinfo **result)
{
	Lookup		real = (Lookup) dlsym(RTLD_NEXT, "getaddrinfo");
	const char *names = getenv("LOOKUP_NAMES");
	const char *hangs = getenv("LOOKUP_HANGS");

	if (node != NULL && names != NULL)
	{
		char		path[1000];
		FILE	   *file;

		snprintf(path, sizeof(path), "%s/%s", names, node);
		file = fopen(path, "r");
		if (file != NULL)
		{
			int			rc = lookup_in(file, real, service, hints, result);

			fclose(file);
			return rc;
		}
	}
	if (node == NULL || hangs == NULL || strstr(node, "hanging") == NULL)
		return real(node, service, hints, result);
	note(hangs, "begun");
	for (int i = 0; i < 6000 && access(hangs, F_OK) == 0; i++)
		usleep(10000);			/* -- slow handler */
	note(hangs, "ended");
	return EAI_AGAIN;
}
